import select
import subprocess
import sys
import threading

import pytest

from fastserve_mega.plan import BlockCopy, CopyDirection
from fastserve_mega.worker.copy_engine import CopyEngine, CopyFailedError

WAIT_S = 60.0


def copy(copy_id, precedes_step=None):
    return BlockCopy(copy_id, CopyDirection.SWAP_OUT, (1,), (1,), precedes_step)


class Moves:
    """Does nothing, in order, when the gate is open."""

    def __init__(self):
        self.done = []
        self.open_gate = threading.Event()

    def __call__(self, copy):
        assert self.open_gate.wait(WAIT_S)
        if copy.copy_id < 0:
            raise OSError("no such block")
        self.done.append(copy.copy_id)


@pytest.fixture
def moves():
    return Moves()


@pytest.fixture
def engine(moves):
    engine = CopyEngine(moves, timeout_s=WAIT_S)
    yield engine
    moves.open_gate.set()
    engine.close()


def is_readable(engine, timeout_s):
    return bool(select.select([engine], [], [], timeout_s)[0])


def test_copies_run_in_order_and_are_told_when_finished(engine, moves):
    assert engine.finished() == {}
    engine.start([copy(0), copy(1)])
    engine.start([copy(2)])
    assert not is_readable(engine, 0.02)
    moves.open_gate.set()
    told = []
    while len(told) < 3:
        assert is_readable(engine, WAIT_S)
        told += engine.finished()
    assert told == moves.done == [0, 1, 2]
    assert not is_readable(engine, 0)


def test_waiting_for_a_copy_waits_for_those_before_it_and_takes_the_time(engine, moves):
    engine.start([copy(0), copy(1)])
    timer = threading.Timer(0.05, moves.open_gate.set)
    timer.start()
    engine.wait([1])
    assert moves.done == [0, 1]
    assert 0.02 < engine.take_wait_s() < WAIT_S
    assert engine.take_wait_s() == 0
    timer.join()
    engine.wait([])
    engine.wait([0, 1])


def test_a_failure_is_told_to_whoever_asks(engine, moves):
    moves.open_gate.set()
    engine.start([copy(-1), copy(1)])
    with pytest.raises(CopyFailedError, match="a KV copy failed: no such block"):
        engine.wait([1])
    assert is_readable(engine, WAIT_S)
    with pytest.raises(CopyFailedError, match="no such block"):
        engine.finished()
    assert moves.done == []


def test_a_wait_has_a_limit(moves):
    engine = CopyEngine(moves, timeout_s=0.02)
    engine.start([copy(0)])
    with pytest.raises(CopyFailedError, match=r"not done within 0.02 s"):
        engine.wait([0])
    moves.open_gate.set()
    engine.close()


def test_without_copies_there_is_no_thread(moves):
    before = threading.active_count()
    engine = CopyEngine(moves, timeout_s=WAIT_S)
    engine.start([])
    assert threading.active_count() == before
    engine.close()


def test_a_rank_without_a_model_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import fastserve_mega.worker.rank"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
