"""What the coordinator and the ranks tell each other; `docs/protocol.md` describes the encoding."""

from __future__ import annotations

from fastserve_mega.plan import Plan
from fastserve_mega.records import Count, Record, Seconds
from fastserve_mega.types import RequestId, SamplingParams, TokenLogprobs

STOP_WORD = b"stop"
"""What rank 0 writes to the coordinator's stdin to end it; that it closes without this word means
that rank 0 has died."""


class WorkerReady(Record, frozen=True, tag=True):
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


class StepCommand(Record, frozen=True, tag=True):
    """One step for all ranks."""

    plan: Plan
    token_ids: tuple[tuple[int, ...], ...]
    """Input tokens of each slice of plan.batch, in its order."""
    started: tuple[SequenceStart, ...] = ()


class SequencesStarted(Record, frozen=True, tag=True):
    """Requests that are new in the next StepCommand, where one frame could not hold them all."""

    started: tuple[SequenceStart, ...]


class ScoredPrompt(Record, frozen=True):
    """How probable prompt tokens are that follow the input of a slice."""

    index: Count
    """Index of the slice in plan.batch."""
    start: Count
    """Position of the first of them in the prompt."""
    logprobs: tuple[TokenLogprobs, ...]


class StepResult(Record, frozen=True, tag=True):
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
    compute_s: Seconds = 0.0
    """What the step took that rank, measured there, where steps overlap with what is said of them;
    0: as long as from its dispatch to its result."""


class CopyResult(Record, frozen=True, tag=True):
    """Sent by every rank for each BlockCopy, once its blocks have been copied there."""

    copy_id: Count
    rank: Count
    copy_s: Seconds
    """What the copying took, without the wait for copies before it."""


class WorkerFailed(Record, frozen=True, tag=True):
    rank: Count
    message: str


class Shutdown(Record, frozen=True, tag=True):
    """The worker ends its loop."""

    failed: bool = False
    """Another rank was lost: exit with a non-zero status, without waiting for the others."""


class KeepAlive(Record, frozen=True, tag=True):
    """Sent to every rank every few seconds: an idle coordinator is not a lost one.

    A rank that it cannot be sent to is lost.
    """


RankMessage = (
    WorkerReady | SequencesStarted | StepCommand | StepResult | CopyResult | WorkerFailed
    | Shutdown | KeepAlive
)  # fmt: skip
