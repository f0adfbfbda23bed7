"""Every message on the wire, as a frozen dataclass. `docs/protocol.md` describes the encoding."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from fastserve_mega.plan import Plan
from fastserve_mega.snapshot import Percentiles, ReplicaView
from fastserve_mega.types import FinishReason, RequestId, SamplingParams, TokenLogprobs, Usage

STOP_WORD = b"stop"
"""What rank 0 writes to the coordinator's stdin to end it; that it closes without this word means
that rank 0 has died."""


def worker_identity(rank: int) -> bytes:
    """ZeroMQ's name of a rank's connection: so the coordinator knows it before it says anything."""
    return f"rank-{rank}".encode()


class Kind(IntEnum):
    """Second byte of each frame. Numbers are never reused."""

    HELLO = 1
    SUBMIT = 2
    CANCEL = 3
    PING = 4
    GET_METRICS = 5
    GET_SNAPSHOT = 6

    WELCOME = 32
    TOKENS = 33
    FINISHED = 34
    REFUSED = 35
    PONG = 36
    METRICS = 37
    RESTARTING = 38
    SNAPSHOT = 39

    WORKER_READY = 64
    STEP_COMMAND = 65
    STEP_RESULT = 66
    WORKER_FAILED = 67
    SHUTDOWN = 68
    COPY_RESULT = 69
    KEEP_ALIVE = 70
    SEQUENCES_STARTED = 71


# --- client to coordinator ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hello:
    """First message of a client; answered by Welcome."""


@dataclass(frozen=True, slots=True)
class Submit:
    """Start a request, or go on with one of which `received` tokens already reached the client."""

    request_id: RequestId
    prompt: tuple[int, ...]
    params: SamplingParams
    received: tuple[int, ...] = ()
    """Output tokens the client holds already; the stream goes on at offset len(received)."""
    priority: int = 0
    """0 is normal, lower is sooner."""
    timeout_s: float | None = None
    """End with `timeout` when unfinished after this many seconds."""
    cache_salt: str = ""
    """The prefix cache shares KV among requests with the same salt only."""
    failed_attempts: int = 0
    """How often in a row `Restarting` has named it, without a token of it since."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """End a request; answered by its Finished, or Refused when it is unknown."""

    request_id: RequestId


@dataclass(frozen=True, slots=True)
class Ping:
    """A sign of life; answered by Pong. A client with unfinished requests sends them regularly."""


@dataclass(frozen=True, slots=True)
class GetMetrics:
    """Answered by Metrics."""


@dataclass(frozen=True, slots=True)
class GetSnapshot:
    """Answered by Snapshot."""

    max_requests: int = 200
    """Views of requests of each replica, at most."""

    def __post_init__(self) -> None:
        if self.max_requests < 0:
            raise ValueError(f"max_requests must not be negative, got {self.max_requests}")


# --- coordinator to client ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Welcome:
    """What a client needs to know about the server."""

    epoch: str
    """Changes when the coordinator restarts; unfinished requests must then be submitted again."""
    model_name: str
    model_path: str
    """Directory on the server's machine; a client on it can load the tokenizer from there."""
    max_context: int
    """Tokens of prompt and answer together."""
    vocab_size: int
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tokens:
    """Output tokens [offset, offset + len(token_ids)) of a request."""

    request_id: RequestId
    offset: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs | None, ...] = ()
    """One for each token when the request asks for them, else empty. None for a token that the
    client must have received before it submitted the request to this coordinator."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The last message of an accepted or rejected request."""

    request_id: RequestId
    reason: FinishReason
    usage: Usage
    message: str = ""
    """One sentence when the reason needs one."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The sender's message was wrong; nothing else happened."""

    message: str
    """One sentence with the value and the limit."""
    request_id: RequestId | None = None


@dataclass(frozen=True, slots=True)
class Restarting:
    """The ranks were lost and are started again; unfinished requests go on after that."""

    within_s: float
    """How long it may take, seconds. Then a new epoch answers pings, and wants the requests
    submitted again."""
    reason: str
    suspects: tuple[RequestId, ...] = ()
    """Requests of this client that were being computed when the ranks were lost."""


@dataclass(frozen=True, slots=True)
class Pong:
    epoch: str


@dataclass(frozen=True, slots=True)
class Metrics:
    """Prometheus exposition text."""

    text: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the server is doing. Counters count from its start."""

    clock_s: float
    """Of the coordinator, for rates between two snapshots."""
    replicas: tuple[ReplicaView, ...]
    prompt_tokens: int
    generation_tokens: int
    finished_requests: int
    ttft_s: Percentiles
    jct_s: Percentiles


# --- coordinator and workers -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A rank has loaded its part of the model and allocated its pools."""

    rank: int
    device_blocks: int
    """Blocks of its pool, the null block included."""
    host_blocks: int
    """Likewise of its pool in host memory; 0 when the strategy does not swap."""
    block_bytes: int
    """Memory of its share of a block."""


@dataclass(frozen=True, slots=True)
class SequenceStart:
    """Told to the workers with the first slice of a request."""

    request_id: RequestId
    params: SamplingParams
    seed: int
    prompt_tokens: int
    prompt: tuple[int, ...] = ()
    """The prompt's tokens, where sampling depends on them, else empty. The slices need not show
    all of them: those that the prefix cache knows are not computed."""
    output: tuple[int, ...] = ()
    """Output tokens from before, where sampling depends on them, else empty."""


@dataclass(frozen=True, slots=True)
class SamplingFailure:
    """Why a request got no token, though nothing is wrong with the rank."""

    index: int
    """Of its place in StepResult.token_ids, which holds no token."""
    message: str
    """One sentence."""


@dataclass(frozen=True, slots=True)
class StepCommand:
    """One step for all ranks."""

    plan: Plan
    token_ids: tuple[tuple[int, ...], ...]
    """Input tokens of each slice of plan.batch, in its order."""
    started: tuple[SequenceStart, ...] = ()


@dataclass(frozen=True, slots=True)
class SequencesStarted:
    """Requests that are new in the next StepCommand, where one frame could not hold them all."""

    started: tuple[SequenceStart, ...]


@dataclass(frozen=True, slots=True)
class StepResult:
    """Sent by the rank that sampled, after each step with a batch."""

    step_id: int
    token_ids: tuple[int, ...]
    """One token for each slice of plan.batch with `samples`, in its order."""
    copy_wait_s: float = 0.0
    """How long the step stood still on that rank for the copies that precede it."""
    logprobs: tuple[TokenLogprobs | None, ...] = ()
    """One for each token when any request of the batch asks for them, else empty."""
    failures: tuple[SamplingFailure, ...] = ()


@dataclass(frozen=True, slots=True)
class CopyResult:
    """Sent by every rank for each BlockCopy, once its blocks have been copied there."""

    copy_id: int
    rank: int
    copy_s: float
    """What the copying took, without the wait for copies before it."""


@dataclass(frozen=True, slots=True)
class WorkerFailed:
    rank: int
    message: str


@dataclass(frozen=True, slots=True)
class Shutdown:
    """The worker ends its loop."""

    failed: bool = False
    """Another rank was lost: exit with a non-zero status, without waiting for anybody."""


@dataclass(frozen=True, slots=True)
class KeepAlive:
    """Sent to every rank every few seconds: an idle coordinator is not a lost one.

    A rank that it cannot be sent to is lost.
    """


Message = (
    Hello | Submit | Cancel | Ping | GetMetrics | GetSnapshot
    | Welcome | Tokens | Finished | Refused | Pong | Metrics | Snapshot | Restarting
    | WorkerReady | SequencesStarted | StepCommand | StepResult | CopyResult | WorkerFailed
    | Shutdown | KeepAlive
)  # fmt: skip

KIND_OF: dict[type, Kind] = {
    Hello: Kind.HELLO,
    Submit: Kind.SUBMIT,
    Cancel: Kind.CANCEL,
    Ping: Kind.PING,
    GetMetrics: Kind.GET_METRICS,
    GetSnapshot: Kind.GET_SNAPSHOT,
    Welcome: Kind.WELCOME,
    Tokens: Kind.TOKENS,
    Finished: Kind.FINISHED,
    Refused: Kind.REFUSED,
    Pong: Kind.PONG,
    Metrics: Kind.METRICS,
    Snapshot: Kind.SNAPSHOT,
    Restarting: Kind.RESTARTING,
    WorkerReady: Kind.WORKER_READY,
    SequencesStarted: Kind.SEQUENCES_STARTED,
    StepCommand: Kind.STEP_COMMAND,
    StepResult: Kind.STEP_RESULT,
    WorkerFailed: Kind.WORKER_FAILED,
    Shutdown: Kind.SHUTDOWN,
    CopyResult: Kind.COPY_RESULT,
    KeepAlive: Kind.KEEP_ALIVE,
}
