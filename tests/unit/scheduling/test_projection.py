"""Work that is started fits: nothing is computed twice for the sake of the order."""

from __future__ import annotations

import math

import pytest
from fixed_costs import Driver, arrived, make_scheduler, names
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve_mega.scheduling.kv.admission import KvProjection
from fastserve_mega.system.config import SwapConfig


def make_projected(**options):
    options.setdefault("swap", SwapConfig(strategy="proactive", write_through_blocks=0))
    return make_scheduler(admission="projected", **options)


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 3000), max_size=30),
    requests=st.integers(1, 500),
    tokens=st.integers(1, 100_000),
    max_tokens=st.integers(1, 4000),
)
def test_the_peak_is_at_least_what_there_is_and_grows_with_it(
    lengths, requests, tokens, max_tokens
):
    projection = KvProjection(max_batch_size=16)
    for length in lengths:
        projection.observe(length, 1)
    peak = projection.peak_tokens(requests, tokens, max_tokens)
    assert peak >= tokens
    assert projection.peak_tokens(requests, tokens + 10, max_tokens) >= peak
    # No answer gets longer than twice the mean in this model, and the margin is bounded.
    margin = 3.0 * math.sqrt(requests / 3) * max_tokens
    assert peak <= tokens + 2 * requests * max_tokens + margin


def test_the_peak_follows_what_answers_are_like():
    projection = KvProjection(max_batch_size=16)
    before = projection.peak_tokens(100, 1000, 4096)
    for _ in range(300):
        projection.observe(1000, 1)
    assert projection.peak_tokens(100, 1000, 4096) > 5 * before
    for _ in range(2000):
        projection.observe(10, 1)
    assert projection.peak_tokens(100, 1000, 4096) < before


def test_the_first_request_is_started_however_long_its_answer_may_be():
    scheduler = make_projected(device_blocks=12, host_blocks=0)
    plan = scheduler.step(0.0, [arrived("a", 30, 10)])
    assert names(plan) == ["a"]


def test_no_more_are_started_than_will_fit():
    scheduler = make_projected(device_blocks=101, host_blocks=101, max_batch_size=4)
    driver = Driver(scheduler, {f"r{i}": 100 for i in range(40)})
    driver.step([arrived(f"r{i}", 20, 100) for i in range(40)])
    for _ in range(300):
        driver.step()
    waiting, resident, swapped = scheduler.place_lengths()
    # 200 blocks of 4 tokens; an answer of 100 tokens and its prompt need 30 blocks at the end.
    assert waiting > 0
    assert 4 <= resident + swapped <= 9
    assert scheduler.memory.swapper.recomputed_tokens == 0


@pytest.mark.parametrize("strategy", ["proactive", "reactive", "recompute"])
def test_an_arrival_of_higher_priority_costs_nobody_its_kv(strategy):
    """Without a host pool a preemption would drop KV."""
    swap = SwapConfig(strategy=strategy)
    scheduler = make_projected(device_blocks=12, host_blocks=0, max_batch_size=1, swap=swap)
    driver = Driver(scheduler, {"long": 6, "short": 3})
    driver.step([arrived("long", 24, 6)])
    driver.step()
    driver.step([arrived("short", 20, 3)])
    driver.run_until_idle()
    assert list(driver.finished_at) == ["long", "short"]
    assert scheduler.memory.swapper.recomputed_tokens == 0


def test_who_was_dropped_comes_back_before_those_that_were_never_started():
    scheduler = make_projected(device_blocks=21, host_blocks=0, max_batch_size=2)
    # Two answers that outgrow the pool together, and short requests that arrive all the time.
    names_of_short = [f"s{i}" for i in range(400)]
    driver = Driver(scheduler, {"a": 60, "b": 60, **dict.fromkeys(names_of_short, 2)})
    driver.step([arrived(name, 8, 60) for name in names_of_short[:200]])
    driver.run_until_idle()  # answers were short so far
    driver.step([arrived("a", 8, 60), arrived("b", 8, 60)])
    while not scheduler.memory.swapper.preemptions:
        driver.step()
    (dropped,) = scheduler.memory.started.returning
    # The other one holds most of the pool; a short one would fit beside it.
    late = names_of_short[200:]
    started = {name for plan in driver.plans for name in names(plan)}
    while dropped.request_id not in names(plan := driver.step([arrived(late.pop(), 4, 60)])):
        assert set(names(plan)) <= started
    assert scheduler.memory.started.returning == ()
    driver.run_until_idle()
