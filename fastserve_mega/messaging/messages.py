"""Every message on the wire. `docs/protocol.md` describes the encoding."""

from __future__ import annotations

from fastserve_mega.plan import Plan
from fastserve_mega.records import Count, OpenRecord, PositiveFloat, PositiveInt, Record, Seconds
from fastserve_mega.snapshot import Percentiles, ReplicaView
from fastserve_mega.types import (
    FinishReason,
    RequestId,
    SamplingParams,
    Timings,
    TokenLogprobs,
    Usage,
)

STOP_WORD = b"stop"
"""What rank 0 writes to the coordinator's stdin to end it; that it closes without this word means
that rank 0 has died."""


class _Message(Record, frozen=True, tag=True):
    """Carries its class name as `type`."""


class _Answer(OpenRecord, frozen=True, tag=True):
    """Goes to a client, which may be older than the coordinator and skips unknown fields."""


# --- client to coordinator ---------------------------------------------------------------------


class Hello(_Message, frozen=True):
    """First message of a client; answered by Welcome."""


class Submit(_Message, frozen=True):
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
    failed_attempts: Count = 0
    """How often in a row `Restarting` has named it, without a token of it since."""
    fingerprint: str = ""
    """Digest of all that the client was asked for. Whoever submits the same id with the same one is
    sent the answer from the start, up to a minute after its end; empty: nobody."""
    client: str = ""
    """Who asks, for the scheduler, which shares the server among clients; empty is the connection
    that it comes by."""
    weight: PositiveFloat = 1.0
    """The client's share is in proportion to this."""
    expected_output_tokens: PositiveInt | None = None
    """How long the answer will be, as far as the client knows; None: it does not say."""
    session: str = ""
    """Requests of a client with the same one share what they were served; empty is none."""


class Cancel(_Message, frozen=True):
    """End a request; answered by its Finished, or Refused when it is unknown."""

    request_id: RequestId


class Ping(_Message, frozen=True):
    """A sign of life; answered by Pong. A client with unfinished requests sends them regularly."""


class GetMetrics(_Message, frozen=True):
    """Answered by Metrics."""


class GetSnapshot(_Message, frozen=True):
    """Answered by Snapshot."""

    max_requests: Count = 200
    """Views of requests of each replica, at most."""


# --- coordinator to client ---------------------------------------------------------------------


class Welcome(_Answer, frozen=True):
    """What a client needs to know about the server."""

    epoch: str
    """Changes when the coordinator restarts; unfinished requests must then be submitted again."""
    model_name: str
    model_path: str
    """Directory on the server's machine; a client on it can load the tokenizer from there."""
    max_context: Count
    """Tokens of prompt and answer together."""
    vocab_size: Count
    eos_token_ids: tuple[int, ...]
    restart_within_s: Seconds = 0.0
    """When the coordinator is lost without a word, somebody starts it again within this time; 0:
    nobody does."""


class Tokens(_Answer, frozen=True):
    """Output tokens [offset, offset + len(token_ids)) of a request."""

    request_id: RequestId
    offset: Count
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs | None, ...] = ()
    """One for each token when the request asks for them, else empty. None for a token that the
    client must have received before it submitted the request to this coordinator."""
    embedding: bytes = b""
    """Of the prompt when the request asks for it, else empty: numbers of 32 bits, little-endian."""


class PromptLogprobs(_Answer, frozen=True):
    """How probable prompt tokens [start, start + len(logprobs)) are, for a request that asks.

    They come before the first output token, and once more when they had to be computed again.
    """

    request_id: RequestId
    start: Count
    """At least 1: the first token follows nothing."""
    logprobs: tuple[TokenLogprobs, ...]


class Finished(_Answer, frozen=True):
    """The last message of an accepted or rejected request."""

    request_id: RequestId
    reason: FinishReason
    usage: Usage
    message: str = ""
    """One sentence when the reason needs one."""
    is_invalid: bool = False
    """With `error`: the request is to blame for it, so sending it again will not help."""
    timings: Timings | None = None
    """None where nothing was done for it."""


class Refused(_Answer, frozen=True):
    """The sender's message was wrong; nothing else happened."""

    message: str
    """One sentence with the value and the limit."""
    request_id: RequestId | None = None
    in_use: bool = False
    """The id belongs to another request."""


class Restarting(_Answer, frozen=True):
    """The ranks were lost and are started again; unfinished requests go on after that."""

    within_s: Seconds
    """How long it may take, seconds. Then a new epoch answers pings, and wants the requests
    submitted again."""
    reason: str
    suspects: tuple[RequestId, ...] = ()
    """Requests of this client that were being computed when the ranks were lost."""


class Pong(_Answer, frozen=True):
    epoch: str


class Metrics(_Answer, frozen=True):
    """Prometheus exposition text."""

    text: str


class Snapshot(_Answer, frozen=True):
    """What the server is doing. Counters count from its start."""

    clock_s: float
    """The coordinator's clock, for rates between two snapshots."""
    replicas: tuple[ReplicaView, ...]
    prompt_tokens: Count
    generation_tokens: Count
    finished_requests: Count
    ttft_s: Percentiles
    jct_s: Percentiles
    policy: str = ""
    """Name of the policy, as configured."""


# --- coordinator and workers -------------------------------------------------------------------


class WorkerReady(_Message, frozen=True):
    """A rank has loaded its part of the model and allocated its pools."""

    rank: Count
    device_blocks: Count
    """Blocks of its pool, the null block included."""
    host_blocks: Count
    """Blocks of its pool in host memory; 0 when the strategy does not swap."""
    block_bytes: Count
    """Memory of its share of a block."""


class SequenceStart(Record, frozen=True):
    """Told to the workers with the first slice of a request."""

    request_id: RequestId
    params: SamplingParams
    seed: int
    num_prompt_tokens: Count
    prompt: tuple[int, ...] = ()
    """The prompt's tokens, where sampling depends on them, else empty. The slices need not show
    all of them: those that the prefix cache knows are not computed."""
    output: tuple[int, ...] = ()
    """Output tokens from before, where sampling depends on them, else empty."""


class SamplingFailure(Record, frozen=True):
    """Why a request got no token, though nothing is wrong with the rank."""

    index: Count
    """Index in StepResult.token_ids, which holds no token."""
    message: str
    """One sentence."""
    is_invalid: bool = False
    """The request asks for what cannot be done, and never will be."""


class StepCommand(_Message, frozen=True):
    """One step for all ranks."""

    plan: Plan
    token_ids: tuple[tuple[int, ...], ...]
    """Input tokens of each slice of plan.batch, in its order."""
    started: tuple[SequenceStart, ...] = ()


class SequencesStarted(_Message, frozen=True):
    """Requests that are new in the next StepCommand, where one frame could not hold them all."""

    started: tuple[SequenceStart, ...]


class ScoredPrompt(Record, frozen=True):
    """How probable prompt tokens are that follow the input of a slice."""

    index: Count
    """Of the slice in plan.batch."""
    start: Count
    """Position of the first of them in the prompt."""
    logprobs: tuple[TokenLogprobs, ...]


class StepResult(_Message, frozen=True):
    """Sent by the rank that sampled, after each step with a batch."""

    step_id: Count
    token_ids: tuple[int, ...]
    """One token for each slice of plan.batch with `samples`, in its order."""
    copy_wait_s: Seconds = 0.0
    """How long the step stood still on that rank for the copies that precede it."""
    logprobs: tuple[TokenLogprobs | None, ...] = ()
    """One for each token when any request of the batch asks for them, else empty."""
    failures: tuple[SamplingFailure, ...] = ()
    scored: tuple[ScoredPrompt, ...] = ()
    embeddings: tuple[bytes, ...] = ()
    """One for each of the tokens whose request asks for it, as in `Tokens`."""
    ahead_s: Seconds = 0.0
    """How long that rank had computed the step when its command came."""


class CopyResult(_Message, frozen=True):
    """Sent by every rank for each BlockCopy, once its blocks have been copied there."""

    copy_id: Count
    rank: Count
    copy_s: Seconds
    """What the copying took, without the wait for copies before it."""


class WorkerFailed(_Message, frozen=True):
    rank: Count
    message: str


class Shutdown(_Message, frozen=True):
    """The worker ends its loop."""

    failed: bool = False
    """Another rank was lost: exit with a non-zero status, without waiting for the others."""


class KeepAlive(_Message, frozen=True):
    """Sent to every rank every few seconds: an idle coordinator is not a lost one.

    A rank that it cannot be sent to is lost.
    """


Message = (
    Hello | Submit | Cancel | Ping | GetMetrics | GetSnapshot
    | Welcome | PromptLogprobs | Tokens | Finished | Refused | Pong | Metrics | Snapshot
    | Restarting
    | WorkerReady | SequencesStarted | StepCommand | StepResult | CopyResult | WorkerFailed
    | Shutdown | KeepAlive
)  # fmt: skip
