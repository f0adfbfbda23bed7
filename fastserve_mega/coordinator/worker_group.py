"""The ranks, as the coordinator sees them: plans out, results in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import zmq

from fastserve_mega.messaging.codec import decode, encode
from fastserve_mega.messaging.messages import (
    CopyResult,
    Shutdown,
    StepCommand,
    StepResult,
    WorkerFailed,
    WorkerReady,
)
from fastserve_mega.messaging.router import Identity, PeerBusyError, PeerGoneError, Router

_BUFFERED_STEPS = 10_000


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
        self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, world_size: int
    ) -> None:
        self._router = Router(context, endpoint, _BUFFERED_STEPS)
        self._world_size = world_size
        self._ready: dict[Identity, WorkerReady] = {}

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
                case WorkerFailed():
                    raise WorkersLostError(f"rank {message.rank} failed: {message.message}")
                case _:
                    raise WorkersLostError(f"a rank sent {type(message).__name__}")

    def wait(self, timeout_s: float) -> bool:
        return bool(self.socket.poll(int(timeout_s * 1000)))

    def shut_down(self) -> None:
        """Tell all ranks to end."""
        for peer in self._ready:
            try:
                self._router.send(peer, Shutdown())
            except (PeerGoneError, PeerBusyError):
                continue

    def close(self) -> None:
        self._router.close()
