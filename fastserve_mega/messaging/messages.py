"""What clients and the coordinator tell each other; `docs/protocol.md` describes the encoding."""

from __future__ import annotations

from fastserve_mega.messaging.rank_messages import RankMessage
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
    """That of the prompt when the request asks for it, else empty: 32-bit floats, little-endian."""


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
    retry_after_s: Seconds | None = None
    """With `rejected`: when there will be room for it if nobody else comes; None: nobody knows."""


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


Message = (
    Hello | Submit | Cancel | Ping | GetMetrics | GetSnapshot
    | Welcome | PromptLogprobs | Tokens | Finished | Refused | Pong | Metrics | Snapshot
    | Restarting | RankMessage
)  # fmt: skip
