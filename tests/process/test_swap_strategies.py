"""Swapping through the whole server: a block copied too late, or freed too early, changes tokens.

The pools of the fake ranks hold token ids, and each token depends on all that are read back.
"""

import pytest
from fake_server import VOCAB, GatedRunner, expected_tokens

from fastserve_mega.client import Client, ServerError
from fastserve_mega.coordinator.replica import Replica
from fastserve_mega.scheduling.kv.swapper import Swapper
from fastserve_mega.system.config import SwapConfig
from fastserve_mega.types import SamplingParams
from fastserve_mega.worker.copy_engine import CopyEngine

DEVICE_BLOCKS = 32
PLENTY = 200
SCARCE = {"device_blocks": DEVICE_BLOCKS, "max_batch_size": 5, "max_batch_tokens": 16}


class SlowCopies(GatedRunner):
    """Copies take as long as some ten steps, so that nothing is right by luck."""

    copy_delay_s = 0.003


def swap(strategy):
    return SwapConfig(strategy=strategy, write_through_blocks=3, write_through_occupancy=0.3)


def generate(client):
    """(answer, tokens of an undisturbed run) of requests that need far more than there is."""
    jobs = []
    for i in range(12):
        prompt = [1 + (i * 37 + j) % (VOCAB - 1) for j in range(1 + 7 * i)]
        count = 5 + (i * 11) % 23
        params = SamplingParams(max_tokens=count, temperature=0.0)
        jobs.append((client.submit(prompt, params), expected_tokens(prompt, count)))
    return [(generation.wait(), expected) for generation, expected in jobs]


def metric(text, name, labels=""):
    return float(text.split(f"\nfastserve_{name}{labels} ")[1].split("\n")[0])


def told_interruptions(timings):
    """Of all answers, after a look at the order of what happened to each."""
    told = []
    for each in timings:
        assert 0 <= each.started_s <= each.first_token_s <= each.ended_s
        times = [at for gap in each.interruptions for at in (gap.at_s, gap.until_s)]
        assert times == sorted(times)
        assert all(each.started_s <= at <= each.ended_s for at in times)
        told += each.interruptions
    return told


def metrics_at_rest(client):
    """When what was kept of the answers has been moved to the host as well."""
    for _ in range(10_000):
        metrics = client.metrics()
        if not metric(metrics, "device_blocks", '{state="owned"}'):
            break
    return metrics


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("host_blocks", [0, 1, 8, PLENTY])
@pytest.mark.parametrize("strategy", ["proactive", "reactive", "recompute", "none"])
def test_every_strategy_gives_the_tokens_of_an_undisturbed_run(
    start_server, strategy, host_blocks, ranks
):
    with start_server(
        swap=swap(strategy), host_blocks=host_blocks, ranks=ranks, make_runner=SlowCopies, **SCARCE
    ) as server, Client(server.endpoint) as client:  # fmt: skip
        answers = generate(client)
        metrics = metrics_at_rest(client)
    assert all(answer.token_ids == expected for answer, expected in answers)
    interruptions = told_interruptions(answer.timings for answer, _ in answers)
    preemptions = metric(metrics, "preemptions_total")
    assert min(preemptions, 1) <= len(interruptions) <= preemptions
    assert metric(metrics, "device_blocks", '{state="owned"}') == 0
    assert metric(metrics, "host_blocks", '{state="owned"}') == 0
    assert (metric(metrics, "preemptions_total") > 0) == (strategy != "none")
    blocks = [
        metric(metrics, "swap_blocks_total", f'{{direction="{way}"}}') for way in ("out", "in")
    ]
    swaps = strategy in ("proactive", "reactive")
    if host_blocks == PLENTY and swaps:
        assert min(blocks) > DEVICE_BLOCKS
        assert all(each.swapped for each in interruptions)
        assert metric(metrics, "recomputed_tokens_total") == 0
        assert metric(metrics, "copy_seconds_sum", '{direction="in"}') > 0
        block_bytes = 4 * 4 * ranks
        moved = metric(metrics, "swap_bytes_total", '{direction="out"}')
        assert moved == blocks[0] * block_bytes
    if host_blocks <= 1 or not swaps:
        assert blocks == [0, 0]
        assert not any(each.swapped for each in interruptions)
    waited = metric(metrics, "copy_wait_seconds_total", '{kind="step"}')
    # With few host blocks it depends on the arrivals whether anything is swapped at all.
    assert (waited > 0) == (strategy == "reactive" and blocks[0] > 0)
    if strategy == "proactive" and host_blocks == PLENTY:
        assert all(runner.overlapped_steps > 0 for runner in server.runners)


# --- the check can fail: each of these breaks the order in one place ------------------------------


class HastyRunner(GatedRunner):
    """Reports each copy at once, and makes it three steps later."""

    def __init__(self, **options):
        super().__init__(**options)
        self._postponed = []

    def move(self, copy):
        self._postponed.append((self.steps + 3, copy))

    def execute(self, batch):
        while self._postponed and self._postponed[0][0] <= self.steps:
            super().move(self._postponed.pop(0)[1])
        return super().execute(batch)


class HastySwapper(Swapper):
    """Frees the blocks that are being copied out before CopyDone."""

    def _copy_out(self, request, sources, leaving, precedes_step):
        self._device.free(list(leaving))
        super()._copy_out(request, sources, (), precedes_step)


class HastyReplica(Replica):
    """Takes the first rank's report for that of all."""

    def take_copy(self, result):
        if flying := self._copies.get(result.copy_id):
            flying.ranks = {result.rank}
            super().take_copy(result)


def assert_wrong_tokens(server):
    with Client(server.endpoint) as client:
        assert any(answer.token_ids != expected for answer, expected in generate(client))


def test_a_rank_that_reports_before_it_has_copied_is_noticed(start_server):
    options = {"swap": swap("proactive"), "host_blocks": PLENTY, **SCARCE}
    with start_server(make_runner=HastyRunner, **options) as server:
        assert_wrong_tokens(server)


def test_blocks_freed_before_copy_done_are_noticed(start_server, monkeypatch):
    monkeypatch.setattr("fastserve_mega.scheduling.kv.manager.Swapper", HastySwapper)
    options = {"swap": swap("proactive"), "host_blocks": PLENTY, **SCARCE}
    with start_server(make_runner=SlowCopies, **options) as server:
        assert_wrong_tokens(server)


def test_not_waiting_for_the_slowest_rank_is_noticed(start_server, monkeypatch):
    monkeypatch.setattr("fastserve_mega.coordinator.assembly.Replica", HastyReplica)
    options = {"swap": swap("proactive"), "host_blocks": PLENTY, "ranks": 2, **SCARCE}
    with start_server(**options) as server:
        server.runner.copy_delay_s = SlowCopies.copy_delay_s
        assert_wrong_tokens(server)


def test_not_waiting_for_the_copies_of_a_step_is_noticed(start_server, monkeypatch):
    """The prototype looks its swap events up under the wrong key, and never waits."""
    monkeypatch.setattr(CopyEngine, "wait", lambda engine, copy_ids: None)
    options = {"swap": swap("reactive"), "host_blocks": PLENTY, **SCARCE}
    with start_server(make_runner=SlowCopies, **options) as server:
        assert_wrong_tokens(server)


# --- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["proactive", "reactive"])
def test_a_failing_copy_leaves_nobody_waiting(start_server, strategy):
    options = {"swap": swap(strategy), "host_blocks": PLENTY, "ranks": 2, **SCARCE}
    with start_server(**options) as server, Client(server.endpoint) as client:
        server.runners[0].fail_copy_with = RuntimeError("host memory is gone")
        with pytest.raises(ServerError, match=r"rank 0 failed: .* copy failed: host memory"):
            generate(client)


@pytest.mark.parametrize("strategy", ["proactive", "reactive"])
def test_a_copy_that_never_ends_leaves_nobody_waiting(start_server, strategy):
    options = {"swap": swap(strategy), "host_blocks": PLENTY, "ranks": 2, **SCARCE}
    with start_server(coordinator={"step_timeout_s": 1.0}, **options) as server:
        server.runners[0].open_copy_gate.clear()
        with Client(server.endpoint) as client, pytest.raises(
            ServerError, match=r"copy \d+ has not been reported by ranks \[0\] within 1 s"
        ):  # fmt: skip
            generate(client)


def test_the_time_in_which_only_copies_run_is_told(start_server):
    """One request's memory, two requests: each waits for the other's KV to leave."""
    options = {"device_blocks": 8, "max_batch_size": 1, "policy": "mlfq"}
    with start_server(
        swap=swap("proactive"), host_blocks=PLENTY, make_runner=SlowCopies, **options
    ) as server, Client(server.endpoint) as client:  # fmt: skip
        params = SamplingParams(max_tokens=20, temperature=0.0)
        answers = [client.submit((i,), params) for i in range(1, 5)]
        for i, answer in enumerate(answers, 1):
            assert answer.wait().token_ids == expected_tokens((i,), 20)
        metrics = client.metrics()
    assert metric(metrics, "copy_wait_seconds_total", '{kind="idle"}') > 0
