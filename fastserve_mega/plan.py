"""What to do next: the data that passes from the decider (scheduling) to the doers (workers)."""

from __future__ import annotations

from enum import StrEnum

from fastserve_mega.records import Count, Record
from fastserve_mega.types import RequestId


class SequenceSlice(Record, frozen=True, array_like=True, gc=False):
    """The part of one request that a step computes: tokens [start, start + num_tokens).

    A step makes one per running request: so it travels as an array, and the garbage collector,
    which finds only cycles, does not follow it.
    """

    request_id: RequestId
    start: Count
    """Position of the first token, counted from the start of the prompt; tokens before it have
    their KV in the block table already."""
    num_tokens: Count
    samples: bool
    """True when the last token of the slice is the last known one, so the step yields a token."""
    block_start: Count
    """Index into the request's block table from which `block_ids` replace it."""
    block_ids: tuple[Count, ...]
    """Device blocks of block_table[block_start:]; empty when the table is unchanged."""


class CopyDirection(StrEnum):
    """Which way KV blocks move between the pools of a rank."""

    SWAP_OUT = "swap_out"  # device to host
    SWAP_IN = "swap_in"  # host to device


class BlockCopy(Record, frozen=True, array_like=True, gc=False):
    """Blocks to copy between device and host memory, the same ids on every rank."""

    copy_id: Count
    """Named by the CopyDone of every rank."""
    direction: CopyDirection
    source_ids: tuple[Count, ...]
    target_ids: tuple[Count, ...]
    precedes_step: Count | None
    """The step that reads the target blocks and must wait for this copy, if any."""


class Plan(Record, frozen=True):
    """One step of all ranks: decided by the scheduler, executed by the workers."""

    step_id: Count
    """Strictly increasing by one; a worker refuses a gap."""
    batch: tuple[SequenceSlice, ...]
    """May be empty when there are only copies; such a plan yields no result."""
    copies: tuple[BlockCopy, ...] = ()
    released: tuple[RequestId, ...] = ()
    """Requests the workers may forget; their blocks are reused from this step on."""

    @property
    def num_tokens(self) -> int:
        return sum(piece.num_tokens for piece in self.batch)
