"""Clients share the server by what they were served, whatever the policy."""

from __future__ import annotations

from collections import Counter

import pytest
from fixed_costs import Driver, arrived, make_scheduler, names
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fastserve_mega.scheduling.events import Aborted, StepDone

POLICIES = ("paced", "skip_join_mlfq", "mlfq", "fcfs", "fixed_priority", "srpt")
TOKENS = 24


def backlogged(policy, weights, batch, lengths):
    """A scheduler and what arrives: of each client more than is served in the test."""
    scheduler = make_scheduler(
        policy=policy, max_batch_size=batch, max_batch_tokens=TOKENS, device_blocks=20_000,
        starvation_limit_s=3.0,
    )  # fmt: skip
    outputs = {}
    events = []
    for client, weight in weights.items():
        for number in range(150):
            prompt, output = lengths[client][number % len(lengths[client])]
            outputs[f"{client}{number}"] = output
            events.append(
                arrived(
                    f"{client}{number}", prompt, client=client, weight=weight,
                    oracle_output_tokens=output,
                )
            )  # fmt: skip
    return scheduler, outputs, events


lengths = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 20)), min_size=1, max_size=5)
quickly = settings(
    max_examples=6, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate]
)


@pytest.mark.parametrize("policy", POLICIES)
@quickly
@given(data=st.data(), batch=st.integers(1, 8), late=st.integers(0, 10))
def test_two_clients_who_want_more_are_served_by_their_weights(policy, data, batch, late):
    weights = {"a": data.draw(st.sampled_from([0.5, 1.0])), "b": data.draw(st.sampled_from([1, 4]))}
    of_each = {"a": data.draw(lengths), "b": data.draw(lengths)}
    scheduler, outputs, events = backlogged(policy, weights, batch, of_each)
    driver = Driver(scheduler, outputs)
    driver.step(events[:150])
    for _ in range(late):
        driver.step()
    driver.step(events[150:])
    # Of their counters; the difference of what was served from some moment on is at most twice it.
    bound = scheduler.fair_share.counters.slack + TOKENS / min(weights.values())
    served = Counter()
    for _ in range(60):
        left = Counter(name[0] for name in outputs if name not in driver.finished_at)
        if min(left["a"], left["b"]) <= batch:
            break
        for piece in driver.step().batch:
            served[piece.request_id[0]] += piece.num_tokens / weights[piece.request_id[0]]
        assert abs(served["a"] - served["b"]) <= 2 * bound


@pytest.mark.parametrize("policy", POLICIES)
@quickly
@given(
    batch=st.integers(1, 6),
    arrivals=st.lists(
        st.lists(
            st.tuples(st.sampled_from("abcd"), st.integers(1, 50), st.integers(1, 9)), max_size=12
        ),
        min_size=1,
        max_size=12,
    ),
)
def test_no_place_is_empty_while_somebody_waits(policy, batch, arrivals):
    scheduler = make_scheduler(
        policy=policy, max_batch_size=batch, max_batch_tokens=TOKENS, device_blocks=20_000
    )
    outputs, count = {}, 0
    driver = Driver(scheduler, outputs)
    for each in arrivals:
        events = []
        for client, prompt, output in each:
            count += 1
            outputs[f"r{count}"] = driver._left[f"r{count}"] = output
            events.append(arrived(f"r{count}", prompt, client=client, oracle_output_tokens=output))
        plan = driver.step(events)
        if plan is None:
            assert not scheduler.unfinished
        else:
            is_full = len(plan.batch) == batch or plan.num_tokens == TOKENS
            assert is_full or len(plan.batch) == scheduler.unfinished
    driver.run_until_idle()


@pytest.mark.parametrize("policy", POLICIES)
def test_one_client_is_served_as_if_there_were_none(policy):
    plans = []
    for client in ("", "somebody"):
        scheduler = make_scheduler(policy=policy, max_batch_size=3, max_batch_tokens=TOKENS,
                                   device_blocks=60, starvation_limit_s=2.0)  # fmt: skip
        driver = Driver(scheduler, {f"r{i}": 1 + i % 7 for i in range(90)})
        for start in range(0, 90, 30):
            driver.step([
                arrived(f"r{i}", 1 + 11 * i % 37, client=client, oracle_output_tokens=1 + i % 7)
                for i in range(start, start + 30)
            ])  # fmt: skip
        driver.run_until_idle()
        plans.append(driver.plans)
    assert plans[0] == plans[1]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("first", ["flood", "other"])
def test_a_flood_waits_in_its_own_line(policy, first):
    """However much came before it: a newcomer is in the next step."""
    scheduler = make_scheduler(policy=policy, max_batch_size=4, starvation_limit_s=3.0)
    flood = [arrived(f"flood{i}", 1, client="flood", oracle_output_tokens=50) for i in range(2_000)]
    driver = Driver(scheduler, {f"flood{i}": 50 for i in range(2_000)} | {"other": 1, "new": 3})
    other = [arrived("other", 1, client="other", oracle_output_tokens=1)]
    driver.step(flood if first == "flood" else other + flood)
    for _ in range(5):
        driver.step()
    driver.step([arrived("new", 30, client="new", oracle_output_tokens=3)])
    assert "new" in names(driver.plans[-1])
    driver.step()
    driver.step()
    assert all("new" in names(plan) for plan in driver.plans[-3:])


def test_what_was_not_used_is_not_owed():
    """Who wanted little for long has no more than a share when it wants much."""
    scheduler = make_scheduler(policy="fcfs", max_batch_size=4, max_batch_tokens=TOKENS)
    outputs = {f"busy{i}": 40 for i in range(400)} | {f"late{i}": 40 for i in range(400)}
    driver = Driver(scheduler, outputs | {"little": 200})
    driver.step([arrived("little", 1, 300, client="late")])
    driver.step([arrived(f"busy{i}", 1, client="busy") for i in range(400)])
    for _ in range(150):
        driver.step()
    driver.step([arrived(f"late{i}", 1, client="late") for i in range(400)])
    served = Counter()
    for _ in range(100):
        served.update(name[:4] for name in names(driver.step()))
    assert abs(served["busy"] - (served["late"] + served["litt"])) <= 2 * TOKENS + 4


def test_who_leaves_ahead_comes_back_ahead():
    scheduler = make_scheduler(policy="fcfs", max_batch_size=4, max_batch_tokens=TOKENS)
    shares = scheduler.fair_share.counters
    driver = Driver(scheduler, {"a": 50, "b": 1, "c": 50, "again": 5})
    driver.step([
        arrived("a", 1, client="a"), arrived("b", 20, client="b"), arrived("c", 1, client="c"),
    ])  # fmt: skip
    driver.step()
    assert scheduler.find("b") is None
    shares.floor = 0.0  # as if those who stayed had wanted more
    driver.step([arrived("again", 5, client="b")])
    assert shares.active["b"].counter >= 20


def test_a_recomputation_and_what_was_cached_are_free():
    scheduler = make_scheduler(policy="fcfs", max_batch_size=4, max_batch_tokens=100)
    shares = scheduler.fair_share.counters
    hashes = tuple("abcde")
    scheduler.step(0.0, [arrived("one", 20, client="a", block_hashes=hashes)])
    scheduler.step(1.0, [StepDone(0, 1.0), arrived("two", 21, client="b", block_hashes=hashes)])
    assert shares.active["b"].counter - shares.floor <= 1.0


def test_aborted_requests_leave_the_line():
    scheduler = make_scheduler(policy="fcfs", max_batch_size=2)
    driver = Driver(scheduler, {f"a{i}": 5 for i in range(100)} | {"b": 400})
    driver.step([arrived("b", 1, 500, client="b"),
                 *(arrived(f"a{i}", 1, client="a") for i in range(100))])  # fmt: skip
    assert scheduler.place_lengths()[0] > 90
    driver.step([Aborted(f"a{i}") for i in range(100)])
    lines = scheduler.fair_share.lines
    assert lines.num_held == 0
    assert len(names(driver.plans[-1])) == 1
    assert list(lines.held()) == []


def test_clients_come_and_go_in_bounded_memory():
    scheduler = make_scheduler(policy="skip_join_mlfq", max_batch_size=4)
    shares = scheduler.fair_share.counters
    scheduler.step(0.0, [arrived("stays", 1, client="stays"), arrived("too", 1, client="too")])
    for wave in range(6):
        names = [f"r{wave}-{i}" for i in range(3_000)]
        events = [arrived(each, 1, client=f"client {each}") for each in names]
        events += [arrived(f"{each} again", 1, client=f"client {each}") for each in names]
        scheduler.step(1.0 + wave, [StepDone(scheduler._next_step_id - 1, 0.1), *events])
        ended = [Aborted(each) for name in names for each in (name, f"{name} again")]
        scheduler.step(1.5 + wave, ended)
        scheduler.check_integrity()
    assert len(shares.active) == 2
    lines = scheduler.fair_share.lines
    kept = (shares._left, lines._fronts, lines._full, lines._lines._heap, lines._not_full._heap)
    assert max(map(len, kept)) < 10_000
    assert lines.num_held == 0


@pytest.mark.parametrize("policy", ["paced", "skip_join_mlfq", "fcfs"])
def test_the_background_has_no_share_and_stays_out_of_a_step_with_a_prefill(policy):
    scheduler = make_scheduler(policy=policy, max_batch_size=4, max_batch_tokens=TOKENS)
    driver = Driver(scheduler, {f"later{n}": 30 for n in range(4)} | {"soon": 3, "next": 3})
    driver.step([arrived(f"later{n}", 3, client="batch", priority=1000) for n in range(4)])
    assert len(names(driver.step())) == 4  # all of a machine that nobody else wants
    plan = driver.step([arrived("soon", 9, client="batch")])  # the same key, or another one
    assert names(plan) == ["soon"]
    assert len(names(driver.step())) == 4
    plan = driver.step([arrived("next", 9, client="people")])
    assert set(names(plan)) == {"soon", "next"}


def test_beside_others_prefills_of_the_background_are_cut_small():
    scheduler = make_scheduler(policy="paced", max_batch_size=4, max_batch_tokens=64)
    driver = Driver(scheduler, {"soon": 9, "later": 9})
    driver.step([arrived("soon", 2)])
    plan = driver.step([arrived("later", 40, priority=1000)])
    assert {piece.request_id: piece.num_tokens for piece in plan.batch} == {"soon": 1, "later": 5}


@pytest.mark.parametrize("policy", ["paced", "skip_join_mlfq", "fcfs"])
@pytest.mark.parametrize("tokens", [8, 24, 512])
def test_prefills_of_others_in_every_step_do_not_stop_the_background(policy, tokens):
    """A prompt of 2 tokens in each step leaves most of it, and the batch gets on."""
    scheduler = make_scheduler(policy=policy, max_batch_size=4, max_batch_tokens=tokens)
    driver = Driver(scheduler, {"later": 3, **{f"soon{n}": 1 for n in range(200)}})
    driver.step([arrived("soon0", 2), arrived("later", 30, client="batch", priority=1000)])
    for n in range(1, 200):
        assert f"soon{n}" in names(driver.step([arrived(f"soon{n}", 2)]))
    assert "later" in driver.finished_at


@quickly
@given(
    policy=st.sampled_from(["paced", "skip_join_mlfq", "fcfs"]),
    batch=st.integers(2, 8),
    tokens=st.sampled_from([8, 15, 24, 64, 512]),
    arrivals=st.lists(
        st.lists(st.tuples(st.integers(1, 40), st.integers(1, 6)), max_size=2), min_size=1,
        max_size=8,
    ),
)  # fmt: skip
def test_of_nine_steps_with_room_the_background_is_in_one(policy, batch, tokens, arrivals):
    """However the requests of others come: there is a place and a token, and it has waited."""
    scheduler = make_scheduler(
        policy=policy, max_batch_size=batch, max_batch_tokens=tokens, device_blocks=20_000
    )
    outputs = {f"later{n}": 1000 for n in range(batch)}
    driver = Driver(scheduler, outputs)
    driver.step(
        [arrived(name, 60, 1000, client="batch", priority=1000) for name in outputs]
        + [arrived("first", 3)]
    )
    driver._left["first"] = 1
    with_room = 0
    for number in range(150):
        events = []
        for prompt, output in arrivals[number % len(arrivals)]:
            name = f"soon{number}.{len(events)}"
            driver._left[name] = output
            events.append(arrived(name, prompt))
        plan = driver.step(events)
        if any(name.startswith("later") for name in names(plan)):
            with_room = 0
            continue
        used = sum(piece.num_tokens for piece in plan.batch)
        with_room += len(plan.batch) < batch and used < tokens
        assert with_room <= 8


@pytest.mark.parametrize("policy", ["paced", "skip_join_mlfq", "fcfs"])
def test_in_the_background_shorter_requests_that_come_steadily_do_not_pass_for_ever(policy):
    scheduler = make_scheduler(policy=policy, max_batch_size=8, max_batch_tokens=64)
    outputs = {"soon": 90, "long": 60, **{f"short{n}": 1 for n in range(100)}}
    driver = Driver(scheduler, outputs)
    driver.step([arrived("soon", 2), arrived("long", 2, 1000, priority=1000)])
    for n in range(80):
        driver.step([arrived(f"short{n}", 10, 1, priority=1000)])
    assert "long" in driver.finished_at
