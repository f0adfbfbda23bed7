"""Copies and computation on CUDA streams, with stand-ins that know what is ordered after what.

Every operation on a block of a pool is logged with the clock of its stream: a vector of how far
each stream had come at least. Two operations on a block, one of which writes, are a hazard unless
the later one's clock contains the earlier one.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastserve_mega.plan import BlockCopy, CopyDirection
from fastserve_mega.worker import host_pool
from fastserve_mega.worker.copy_engine import CopyEngine
from fastserve_mega.worker.host_pool import CudaCopyEngine
from fastserve_mega.worker.transfer import Stopwatch

BLOCKS = 12


class Stream:
    def __init__(self, *_):
        self.clock = {}

    def tick(self):
        self.clock[self] = self.clock.get(self, 0) + 1

    def join(self, clock):
        self.clock = {
            stream: max(self.clock.get(stream, 0), clock.get(stream, 0))
            for stream in self.clock.keys() | clock.keys()
        }

    def wait_stream(self, other):
        self.join(other.clock)

    def wait_event(self, event):
        self.join(event.clock)


class Event:
    def __init__(self, **_):
        self.clock = {}

    def record(self, stream):
        self.clock = dict(stream.clock)

    def query(self):
        return False


@dataclass(frozen=True)
class Access:
    block: tuple[str, int]
    writes: bool
    stream: Stream
    time: int
    clock: dict[Stream, int]

    def is_before(self, other):
        return other.clock.get(self.stream, 0) >= self.time


class Streams(TorchDispatchMode):
    """The device: its current stream, and what was done to the blocks of two pools."""

    def __init__(self, monkeypatch, pools):
        super().__init__()
        self.compute = self.current = Stream()
        self.accesses = []
        self._pools = pools
        self.host = Stream()  # what the host has seen
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self._on)
        # The thread only waits; here the test says what the host has seen.
        monkeypatch.setattr(CopyEngine, "start", lambda self, copies: None)

    @contextlib.contextmanager
    def _on(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function._schema.name.removeprefix("aten::")
        if name in ("copy_", "fill_"):
            self._log(arguments[0], writes=True)
            if name == "copy_":
                self._log(arguments[1], writes=False)
        elif name in ("index_select", "index_copy_"):
            blocks = arguments[2].tolist()
            self._log(arguments[0], writes=name == "index_copy_", blocks=blocks)
        elif name == "clone":
            self._log(arguments[0], writes=False)
        return function(*arguments, **(options or {}))

    def _log(self, tensor, *, writes, blocks=None):
        for title, pool in self._pools.items():
            if tensor.untyped_storage().data_ptr() != pool.untyped_storage().data_ptr():
                continue
            first = tensor.storage_offset() // pool[0].numel()
            touched = range(first, first + tensor.shape[0]) if blocks is None else blocks
            self.current.join(self.host.clock)
            self.current.tick()
            self.accesses += [
                Access(
                    (title, block), writes, self.current,
                    self.current.clock[self.current], dict(self.current.clock),
                )
                for block in touched
            ]  # fmt: skip

    def hazards(self):
        """Pairs that may happen in either order."""
        return [
            (one.block, one.writes, other.writes)
            for index, one in enumerate(self.accesses)
            for other in self.accesses[index + 1 :]
            if one.block == other.block
            and (one.writes or other.writes)
            and not one.is_before(other)
        ]


class EventBeforeCopy(CudaCopyEngine):
    """Tells that a copy is done when those before it are."""

    def start(self, copies):
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for copy in copies:
                event = Event()
                event.record(self._stream)
                self._events[copy.copy_id] = event
                self._issue(copy)


class CopyBeforeComputation(CudaCopyEngine):
    """Does not wait for what the blocks are written by."""

    def start(self, copies):
        with torch.cuda.stream(self._stream):
            for copy in copies:
                self._issue(copy)
                event = Event()
                event.record(self._stream)
                self._events[copy.copy_id] = event


class NoWait(CudaCopyEngine):
    """Lets the computation begin before the copies that precede it."""

    def wait(self, copy_ids):
        del copy_ids


def run(monkeypatch, engine_class, *, reuse_early=False):
    """Steps as the worker's loop makes them; returns the hazards."""
    device, host = (torch.zeros(BLOCKS, 2, 3) for _ in range(2))
    with Streams(monkeypatch, {"device": device, "host": host}) as streams:
        engine = engine_class(device, host, 1.0)
        device[1:5].fill_(1.0)  # a step computes the KV of one request
        out = BlockCopy(0, CopyDirection.SWAP_OUT, (1, 2, 4, 3), (5, 6, 1, 2), None)
        engine.start([out])
        device[6:8].fill_(2.0)  # the next step is another request's
        if not reuse_early:
            # The host hears of the end of the copy before it gives the blocks away.
            streams.host.join(engine._events[0].clock)
        # In one plan: the first blocks are another's now, whose KV has to leave, and the first
        # request comes back to other blocks.
        device[1:3].fill_(3.0)
        leave = BlockCopy(1, CopyDirection.SWAP_OUT, (6, 7), (8, 9), 2)
        back = BlockCopy(2, CopyDirection.SWAP_IN, (5, 6, 1, 2), (6, 7, 9, 10), 2)
        engine.start([leave, back])
        engine.wait([1, 2])
        device[6:8].clone()  # the step attends to what has come back
        device[9:11].clone()
        hazards = streams.hazards()
    engine._reader.close()
    engine._writer.close()
    return hazards


@pytest.fixture(params=["staged", "direct"])
def path(request, monkeypatch):
    if request.param == "direct":
        monkeypatch.setattr(host_pool, "_LARGE_BLOCK_BYTES", 1)


@pytest.mark.usefixtures("path")
def test_copies_and_computation_are_ordered_wherever_they_share_a_block(monkeypatch):
    assert run(monkeypatch, CudaCopyEngine) == []


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("engine_class", [EventBeforeCopy, CopyBeforeComputation, NoWait])
def test_wrong_orders_are_found(monkeypatch, engine_class):
    assert run(monkeypatch, engine_class)


@pytest.mark.usefixtures("path")
def test_a_block_that_is_given_away_before_its_copy_is_done_is_found(monkeypatch):
    hazards = run(monkeypatch, CudaCopyEngine, reuse_early=True)
    assert {block for block, _, _ in hazards} == {("device", 1), ("device", 2)}


def test_the_thread_that_waits_for_copies_knows_its_device(monkeypatch):
    """Else it would wait on the first device of the machine, and take memory there."""
    selected = []
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "set_device", selected.append)
    engine = CudaCopyEngine(torch.zeros(2, 3), torch.zeros(2, 3), 1.0)
    done = Event()
    done.synchronize = lambda: selected.append("waits")
    engine._begun[7] = SimpleNamespace(elapsed_time=lambda event: 40.0 if event is done else 0.0)
    engine._events[7] = done
    # As long as the stream was at it, and not as long as it was waited for.
    assert engine._await_event(BlockCopy(7, CopyDirection.SWAP_OUT, (1,), (1,), None)) == 0.04
    assert selected == [torch.device("cpu"), "waits"]
    engine.close()


def test_a_device_tells_what_it_took_without_what_it_was_given_before_or_after(monkeypatch):
    clock, told = [0.0], []

    class Timed:
        def __init__(self, *, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def synchronize(self):
            told.append(self.at)

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Timed)
    clock[0] = 40.0
    watch = Stopwatch(torch.device("cuda", 1))
    clock[0] = 65.0
    watch.stop()
    clock[0] = 90.0
    assert (watch.seconds(), told) == (0.025, [65.0])
    assert Stopwatch(torch.device("cpu")).seconds() == 0.0
