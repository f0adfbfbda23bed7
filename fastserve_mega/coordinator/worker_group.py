"""The ranks, as the coordinator sees them: plans out, results in."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator

import msgspec
import zmq

from fastserve_mega.logs import LogLimiter
from fastserve_mega.messaging.frames import (
    MAX_FRAME_BYTES,
    BadFrameError,
    Identity,
    PeerBusyError,
    PeerGoneError,
    Router,
    decode,
    encode,
    with_key,
    worker_identity,
)
from fastserve_mega.messaging.messages import Message
from fastserve_mega.messaging.rank_messages import (
    CopyResult,
    KeepAlive,
    SequencesStarted,
    Shutdown,
    StepCommand,
    StepResult,
    WorkerFailed,
    WorkerReady,
)

_BUFFERED_STEPS = 10_000
_LONGEST_NAME = 40
_LONGEST_REASON = 500
_KEEP_ALIVE_S = 2.0
_LAST_WORDS_MS = 200
"""A rank that dies is noticed within this time, also when there is nothing to do."""

_log = logging.getLogger(__name__)


class WorkersLostError(Exception):
    """A rank failed or fell silent; str() says which and why."""


class ZmqWorkers:
    """The ranks of all replicas, on one socket; each has its rank number in its identity."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        *,
        replicas: int,
        ranks_per_replica: int,
        silence_limit_s: float = 120.0,
    ) -> None:
        """Bind, with a key of this one start: who was not told it gets nothing from this port.

        Args:
            context: of this process.
            endpoint: for the ranks.
            replicas: copies of the model.
            ranks_per_replica: of each of them.
            silence_limit_s: a rank whose host does not answer for so long is lost.

        Raises:
            OSError: the endpoint cannot be bound.
        """
        self._keep_alive_s = min(_KEEP_ALIVE_S, silence_limit_s / 4)
        self._public_key, secret_key = _keys()
        self._router = Router(
            context,
            endpoint,
            _BUFFERED_STEPS,
            unread=_BUFFERED_STEPS,
            silence_limit_s=silence_limit_s,
            secret_key=secret_key,
        )
        self._ranks_per_replica = ranks_per_replica
        self._world_size = replicas * ranks_per_replica
        self._identities = {worker_identity(rank): rank for rank in range(self._world_size)}
        self._strangers = LogLimiter()
        self._ready: dict[Identity, WorkerReady] = {}
        self._connected: set[int] = set()
        self._next_keep_alive = 0.0
        self.groups = tuple(
            WorkerGroup(self, range(first, first + ranks_per_replica))
            for first in range(0, self._world_size, ranks_per_replica)
        )

    @property
    def socket(self) -> zmq.Socket[bytes]:
        return self._router.socket

    @property
    def endpoint(self) -> str:
        """Where ranks connect, with the key that they need: for nobody else."""
        address = self._router.endpoint
        return with_key(address, self._public_key) if self._public_key else address

    @property
    def all_ready(self) -> bool:
        return len(self._ready) == self._world_size

    @property
    def missing_ranks(self) -> list[int]:
        ready = {worker.rank for worker in self._ready.values()}
        return [rank for rank in range(self._world_size) if rank not in ready]

    def members(self, ranks: range) -> list[tuple[Identity, WorkerReady]]:
        """The ranks among these that are ready."""
        return [(peer, worker) for peer, worker in self._ready.items() if worker.rank in ranks]

    def send(self, peer: Identity, frame: bytes) -> None:
        """Send to one rank.

        Raises:
            WorkersLostError: it does not take it.
        """
        try:
            self._router.send_frame(peer, frame)
        except (PeerGoneError, PeerBusyError):
            self.receive()  # its last words, which say more, may have come just now
            raise WorkersLostError(
                f"rank {self._ready[peer].rank} does not take its steps"
            ) from None

    def receive(self) -> None:
        """Hand what has arrived to the groups, without waiting.

        What comes from others than these ranks is dropped.

        Raises:
            WorkersLostError: a rank reported that it failed, or sent nonsense.
        """
        for peer, frames in self._router.receive():
            if (rank := self._identities.get(peer)) is None:
                if number := self._strangers.count("stranger", time.monotonic()):
                    _log.warning(
                        "dropped %d messages to the ranks' port from who is none of its ranks, "
                        "now %r",
                        number,
                        peer[:_LONGEST_NAME],
                    )
                continue
            try:
                message = decode(b"".join(frames))
            except BadFrameError as error:
                raise WorkersLostError(f"{peer.decode()}: {error}") from None
            self._take(peer, rank, message)

    def _take(self, peer: Identity, rank: int, message: Message) -> None:
        match message:
            case WorkerFailed():
                told = " ".join(message.message[:_LONGEST_REASON].split())
                raise WorkersLostError(f"rank {rank} failed: {told}")
            case WorkerReady() | CopyResult() if message.rank != rank:
                raise WorkersLostError(
                    f"rank {rank} sent {type(message).__name__} of rank {message.rank}"
                )
            case WorkerReady() if peer not in self._ready:
                self._ready[peer] = message
                self._connected.add(rank)
            case StepResult() | CopyResult() if peer in self._ready:
                self.groups[rank // self._ranks_per_replica].inbox.append(message)
            case _:
                raise WorkersLostError(f"rank {rank} sent {type(message).__name__}, out of turn")

    def hear_last_words(self) -> None:
        """Let what a rank said as it ended arrive, which is slower than the news of its end.

        Raises:
            WorkersLostError: it said why.
        """
        if self.socket.poll(_LAST_WORDS_MS):
            self.receive()

    def wait(self, timeout_s: float) -> bool:
        """Wait for any rank's message; False when none came in time."""
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
                    self.receive()  # its last words
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


class WorkerGroup:
    """The ranks of one replica: plans out, results in, in the order of their dispatch."""

    def __init__(self, workers: ZmqWorkers, ranks: range) -> None:
        self.ranks = ranks
        """Their numbers among all ranks."""
        self.inbox: deque[StepResult | CopyResult] = deque()
        """Results of these ranks that `results` has not yielded yet."""
        self._workers = workers

    @property
    def device_blocks(self) -> int:
        """Blocks of the smallest pool: a block has the same id on every rank."""
        return min(worker.device_blocks for _, worker in self._workers.members(self.ranks))

    @property
    def host_blocks(self) -> int:
        """Blocks of the smallest pool in host memory."""
        return min(worker.host_blocks for _, worker in self._workers.members(self.ranks))

    @property
    def block_bytes(self) -> int:
        """Memory of a block, on all ranks of the replica together."""
        return sum(worker.block_bytes for _, worker in self._workers.members(self.ranks))

    def dispatch(self, command: StepCommand) -> None:
        """Send a step to all of them."""
        for frame in _frames(command):
            for peer, _ in self._workers.members(self.ranks):
                self._workers.send(peer, frame)

    def results(self) -> Iterator[StepResult | CopyResult]:
        """Results that have arrived, without waiting.

        Raises:
            WorkersLostError: a rank reported that it failed.
        """
        self._workers.receive()
        while self.inbox:
            yield self.inbox.popleft()

    def wait(self, timeout_s: float) -> bool:
        """Wait for a result; False when none came in time."""
        return bool(self.inbox) or self._workers.wait(timeout_s)


def _keys() -> tuple[str, bytes | None]:
    """A new public key, and the secret one that belongs to it; none where libzmq has no CURVE."""
    if not zmq.has("curve"):
        _log.warning("libzmq has no CURVE: keep others away from coordinator.worker_endpoint")
        return "", None
    public, secret = zmq.curve_keypair()
    return public.decode(), secret


def _frames(command: StepCommand) -> list[bytes]:
    """A step in one frame, or in several where a rank would not take one so long.

    Admission sees to it that each request fits into a frame of its own.
    """
    whole = encode(command)
    if len(whole) <= MAX_FRAME_BYTES:
        return [whole]
    ahead = [encode(SequencesStarted((start,))) for start in command.started]
    return [*ahead, encode(msgspec.structs.replace(command, started=()))]
