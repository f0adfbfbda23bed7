"""What the scheduler is told. Lengths and times only: it never sees tokens or text."""

from __future__ import annotations

from dataclasses import dataclass

from fastserve_mega.types import BlockHash, RequestId


@dataclass(frozen=True, slots=True)
class Arrived:
    """A request was accepted."""

    request_id: RequestId
    prompt_tokens: int
    max_tokens: int
    received_tokens: int = 0
    """Output tokens that exist already; prompt and these are prefilled together."""
    priority: int = 0
    """0 is normal, lower is sooner."""
    block_hashes: tuple[BlockHash, ...] = ()
    """Of the full blocks of these tokens, for the prefix cache; none when it is off."""
    oracle_output_tokens: int | None = None
    """The true output length. Only the simulator knows it, only `srpt` reads it."""


@dataclass(frozen=True, slots=True)
class Aborted:
    """A request must end now, for whatever reason; unknown ids are ignored."""

    request_id: RequestId


@dataclass(frozen=True, slots=True)
class StepDone:
    """A dispatched plan was executed by all ranks."""

    step_id: int
    elapsed_s: float
    """From dispatch to result."""
    finished: tuple[RequestId, ...] = ()
    """Requests whose last token this step yielded."""
    filled: tuple[tuple[RequestId, BlockHash], ...] = ()
    """Requests whose new token is the last one of a block, and the hash of that block."""


@dataclass(frozen=True, slots=True)
class CopyDone:
    """All ranks have finished a BlockCopy."""

    copy_id: int


@dataclass(frozen=True, slots=True)
class WorkersLost:
    """The ranks restarted: no plan is in flight any more and all device KV is gone."""


Event = Arrived | Aborted | StepDone | CopyDone | WorkersLost
