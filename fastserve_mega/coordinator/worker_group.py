"""The ranks, as the coordinator sees them: plans out, results in."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Protocol

import zmq

from fastserve_mega.messaging.codec import decode, encode
from fastserve_mega.messaging.messages import (
    CopyResult,
    KeepAlive,
    Shutdown,
    StepCommand,
    StepResult,
    WorkerFailed,
    WorkerReady,
    worker_identity,
)
from fastserve_mega.messaging.router import Identity, PeerBusyError, PeerGoneError, Router

_BUFFERED_STEPS = 10_000
_KEEP_ALIVE_S = 2.0
"""A rank that dies is noticed within this time, also when there is nothing to do."""


class WorkersLostError(Exception):
    """A rank failed or fell silent; str() says which and why."""


class WorkerGroup(Protocol):
    """Executes steps, in the order of their dispatch."""

    def dispatch(self, command: StepCommand) -> None:
        """Send a step to all ranks."""

    def results(self) -> Iterator[StepResult | CopyResult]:
        """Results that have arrived, without waiting.

        Raises:
            WorkersLostError: a rank reported that it failed.
        """

    def wait(self, timeout_s: float) -> bool:
        """Wait for a result; False when none came in time."""


class ZmqWorkerGroup:
    """Ranks connected by ZeroMQ; each names itself with its rank number as identity."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        world_size: int,
        *,
        silence_limit_s: float = 120.0,
    ) -> None:
        """Bind.

        Args:
            context: of this process.
            endpoint: for the ranks.
            world_size: how many there are.
            silence_limit_s: a rank whose host does not answer for so long is lost.

        Raises:
            OSError: the endpoint cannot be bound.
        """
        self._keep_alive_s = min(_KEEP_ALIVE_S, silence_limit_s / 4)
        self._router = Router(context, endpoint, _BUFFERED_STEPS, silence_limit_s=silence_limit_s)
        self._world_size = world_size
        self._ready: dict[Identity, WorkerReady] = {}
        self._connected: set[int] = set()
        self._next_keep_alive = 0.0

    @property
    def socket(self) -> zmq.Socket[bytes]:
        return self._router.socket

    @property
    def endpoint(self) -> str:
        return self._router.endpoint

    @property
    def all_ready(self) -> bool:
        return len(self._ready) == self._world_size

    @property
    def missing_ranks(self) -> list[int]:
        ready = {worker.rank for worker in self._ready.values()}
        return [rank for rank in range(self._world_size) if rank not in ready]

    @property
    def device_blocks(self) -> int:
        """Blocks of the smallest pool: a block has the same id on every rank."""
        return min(worker.device_blocks for worker in self._ready.values())

    @property
    def host_blocks(self) -> int:
        """Likewise of the smallest pool in host memory."""
        return min(worker.host_blocks for worker in self._ready.values())

    @property
    def block_bytes(self) -> int:
        """Memory of a block, on all ranks together."""
        return sum(worker.block_bytes for worker in self._ready.values())

    def dispatch(self, command: StepCommand) -> None:
        frame = encode(command)
        for peer, worker in self._ready.items():
            try:
                self._router.send_frame(peer, frame)
            except (PeerGoneError, PeerBusyError):
                for _ in self.results():
                    pass  # its last words, which say more, may have come just now
                raise WorkersLostError(f"rank {worker.rank} does not take its steps") from None

    def results(self) -> Iterator[StepResult | CopyResult]:
        for peer, frames in self._router.receive():
            match message := decode(b"".join(frames), trusted=True):
                case StepResult() | CopyResult():
                    yield message
                case WorkerReady():
                    self._ready[peer] = message
                    self._connected.add(message.rank)
                case WorkerFailed():
                    raise WorkersLostError(f"rank {message.rank} failed: {message.message}")
                case _:
                    raise WorkersLostError(f"a rank sent {type(message).__name__}")

    def wait(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            self.keep_alive()
            if self.socket.poll(int(min(left_s, self._keep_alive_s) * 1000) + 1):
                return True
        return False

    def keep_alive(self) -> None:
        """Call this more often than the ranks' patience allows; it sends only now and then.

        Raises:
            WorkersLostError: a rank that was connected is not so any more.
        """
        now = time.monotonic()
        if now < self._next_keep_alive:
            return
        self._next_keep_alive = now + self._keep_alive_s
        frame = encode(KeepAlive())
        for rank in range(self._world_size):
            try:
                self._router.send_frame(worker_identity(rank), frame)
                self._connected.add(rank)
            except PeerBusyError:
                continue  # a step that it does not take says so
            except PeerGoneError:
                if rank in self._connected:
                    for _ in self.results():
                        pass  # its last words
                    raise WorkersLostError(f"rank {rank} has gone") from None

    def shut_down(self, *, failed: bool = False) -> None:
        """Tell all ranks to end; `failed` when one of them was lost."""
        for rank in range(self._world_size):
            try:
                self._router.send(worker_identity(rank), Shutdown(failed))
            except (PeerGoneError, PeerBusyError):
                continue

    def close(self) -> None:
        self._router.close()
