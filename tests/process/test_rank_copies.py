"""A rank and the copies of its plans: what waits for them, and when they are reported."""

import threading
import time

import pytest
import zmq
from fake_server import VOCAB, WAIT_MS, GatedRunner

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
from fastserve_mega.types import RequestId, SamplingParams
from fastserve_mega.worker.fake_runner import fake_token
from fastserve_mega.worker.loop import WorkerLoop, connect_to_coordinator


@pytest.fixture
def worker():
    """A rank and the socket of its coordinator."""
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
