"""What the scheduler is told. Lengths and times only: it never sees tokens or text."""

from __future__ import annotations

from fastserve_mega.records import Count, PositiveFloat, PositiveInt, Record, Seconds
from fastserve_mega.types import BlockHash, RequestId


class _Event(Record, frozen=True, tag=True):
    """Named by its class in the event log."""


class Arrived(_Event, frozen=True):
    """A request was accepted."""

    request_id: RequestId
    num_prompt_tokens: Count
    max_tokens: Count
    num_received_tokens: Count = 0
    """Output tokens that exist already; prompt and these are prefilled together."""
    priority: int = 0
    """0 is normal, lower is sooner."""
    block_hashes: tuple[BlockHash, ...] = ()
    """Hashes of the full blocks of these tokens, for the prefix cache; none when it is off."""
    oracle_output_tokens: Count | None = None
    """The true output length. Only the simulator knows it, only `srpt` reads it."""
    client: str = ""
    """Who asks: clients share the server by what they were served."""
    weight: PositiveFloat = 1.0
    """The client's share is in proportion to this."""
    expected_output_tokens: PositiveInt | None = None
    """What the client expects; it may be wrong. None when it does not say."""
    session: str = ""
    """Requests of a client with the same one share the service they attained; empty is none."""


class Aborted(_Event, frozen=True):
    """A request must end now, for whatever reason; unknown ids are ignored."""

    request_id: RequestId


class StepDone(_Event, frozen=True):
    """A dispatched plan was executed by all ranks."""

    step_id: Count
    elapsed_s: Seconds
    """From dispatch to result; what it took the ranks where it was begun ahead of its dispatch."""
    finished: tuple[RequestId, ...] = ()
    """Requests whose last token this step yielded."""
    filled: tuple[tuple[RequestId, BlockHash], ...] = ()
    """Requests whose new token is the last one of a block, and the hash of that block."""


class CopyDone(_Event, frozen=True):
    """All ranks have finished a BlockCopy."""

    copy_id: Count


class WorkersLost(_Event, frozen=True):
    """The ranks restarted: no plan is in flight any more and all device KV is gone."""


Event = Arrived | Aborted | StepDone | CopyDone | WorkersLost
