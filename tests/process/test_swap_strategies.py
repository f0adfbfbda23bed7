"""Swapping through the whole server: a block copied too late, or freed too early, changes tokens.

The pools of the fake ranks hold token ids, and each token depends on all that are read back.
"""

import time

import pytest
import zmq
from fake_server import VOCAB, WAIT_MS, GatedRunner, expected_tokens

from fastserve_mega.client import Client, ServerError
from fastserve_mega.coordinator.replica import Replica
from fastserve_mega.messaging.frames import decode, encode
from fastserve_mega.messaging.rank_messages import (
    CopyResult,
    SequenceStart,
    Shutdown,
    StepCommand,
    StepResult,
    WorkerReady,
)
from fastserve_mega.plan import BlockCopy, CopyDirection, Plan, SequenceSlice
from fastserve_mega.scheduling.kv.swapper import Swapper
from fastserve_mega.system.config import SwapConfig
from fastserve_mega.types import RequestId, SamplingParams
from fastserve_mega.worker.copy_engine import CopyEngine
from fastserve_mega.worker.fake_runner import fake_token
from fastserve_mega.worker.loop import WorkerLoop, connect_to_coordinator

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


# --- the worker loop -----------------------------------------------------------------------------


@pytest.fixture
def worker():
    """A rank and the socket of its coordinator."""
    import threading

    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.LINGER, 0)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    runner = GatedRunner(device_blocks=8, host_blocks=8, block_size=4, vocab_size=VOCAB)
    loop = WorkerLoop(
        connect_to_coordinator(context, f"tcp://127.0.0.1:{port}", 0), 0, runner, lambda: True
    )
    thread = threading.Thread(target=loop.run)
    thread.start()
    peer, ready = router.recv_multipart()
    assert decode(ready) == WorkerReady(0, 8, 8, 16)
    yield runner, router, peer
    runner.open_copy_gate.set()
    router.send_multipart((peer, encode(Shutdown())))
    thread.join(WAIT_MS / 1000)
    assert not thread.is_alive()
    runner.close()
    router.close()
    context.term()


def test_a_finished_copy_is_reported_at_once_though_no_step_comes(worker):
    runner, router, peer = worker
    runner.open_copy_gate.clear()
    copies = tuple(BlockCopy(i, CopyDirection.SWAP_OUT, (1 + i,), (1 + i,), None) for i in range(3))
    router.send_multipart((peer, encode(StepCommand(Plan(0, (), copies), ()))))
    assert not router.poll(50)
    opened = time.monotonic()
    runner.open_copy_gate.set()
    for copy in copies:
        assert router.poll(WAIT_MS)
        result = decode(router.recv_multipart()[1])
        assert isinstance(result, CopyResult)
        assert (result.copy_id, result.rank) == (copy.copy_id, 0)
    # The loop looks around twice a second by itself.
    assert time.monotonic() - opened < 0.2


def test_a_step_waits_for_the_copies_its_blocks_need_and_for_no_other(worker):
    runner, router, peer = worker
    name, tokens = RequestId("r"), (7, 8, 9, 10, 11, 12)

    def send(step_id, *copies, start=None, block_start=0, block_ids=()):
        batch, token_ids, known = (), (), ()
        if start is not None:
            count = 4 if start == 0 else 1
            piece = SequenceSlice(name, start, count, start > 0, block_start, block_ids)
            batch, token_ids = (piece,), (tokens[start : start + count],)
        if start == 0:
            params = SamplingParams(temperature=0.0)
            known = (SequenceStart(name, params, 0, len(tokens)),)
        plan = Plan(step_id, batch, copies)
        router.send_multipart((peer, encode(StepCommand(plan, token_ids, known))))

    def receive(kind):
        assert router.poll(WAIT_MS)
        message = decode(router.recv_multipart()[1])
        assert isinstance(message, kind)
        return message

    send(0, start=0, block_ids=(1,))
    assert receive(StepResult).token_ids == ()
    send(1, BlockCopy(0, CopyDirection.SWAP_OUT, (1,), (1,), None))
    receive(CopyResult)

    runner.open_copy_gate.clear()
    runner.entered.clear()
    send(2, BlockCopy(1, CopyDirection.SWAP_IN, (1,), (5,), 2), start=4, block_ids=(5, 6))
    assert not runner.entered.wait(0.05), "the step runs before the KV it reads is there"
    runner.open_copy_gate.set()
    done = {type(m): m for m in (receive(StepResult | CopyResult) for _ in range(2))}
    assert done[StepResult].token_ids == (fake_token(tokens[:5], VOCAB),)
    assert done[StepResult].copy_wait_s > 0

    runner.open_copy_gate.clear()
    send(3, BlockCopy(2, CopyDirection.SWAP_OUT, (5,), (2,), None), start=5, block_start=2)
    assert receive(StepResult).token_ids == (fake_token(tokens, VOCAB),)
    runner.open_copy_gate.set()
    assert receive(CopyResult).copy_id == 2
