"""What to do next: the data that passes from the decider (scheduling) to the doers (workers)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from fastserve_mega.types import RequestId


class SequenceSlice(NamedTuple):
    """The part of one request that a step computes: tokens [start, start + num_tokens).

    A NamedTuple, not a dataclass: a step makes one per running request, and this is the cheapest
    immutable record of the standard library (docs/performance.md).
    """

    request_id: RequestId
    start: int
    """Position of the first token, counted from the start of the prompt; tokens before it have
    their KV in the block table already."""
    num_tokens: int
    samples: bool
    """True when the last token of the slice is the last known one, so the step yields a token."""
    block_start: int
    """Index into the request's block table from which `block_ids` replace it."""
    block_ids: tuple[int, ...]
    """Device blocks of block_table[block_start:]; empty when the table is unchanged."""


class CopyDirection(StrEnum):
    """Which way KV blocks move between the pools of a rank."""

    SWAP_OUT = "swap_out"  # device to host
    SWAP_IN = "swap_in"  # host to device


class BlockCopy(NamedTuple):
    """Blocks to copy between device and host memory, the same ids on every rank.

    A NamedTuple for the same reason as SequenceSlice.
    """

    copy_id: int
    """Named by the CopyDone of every rank."""
    direction: CopyDirection
    source_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    precedes_step: int | None
    """The step that reads the target blocks and must wait for this copy, if any."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One step of all ranks: decided by the scheduler, executed by the workers."""

    step_id: int
    """Strictly increasing by one; a worker refuses a gap."""
    batch: tuple[SequenceSlice, ...]
    """May be empty when there are only copies; such a plan yields no result."""
    copies: tuple[BlockCopy, ...] = ()
    released: tuple[RequestId, ...] = ()
    """Requests the workers may forget; their blocks are reused from this step on."""

    @property
    def num_tokens(self) -> int:
        return sum(piece.num_tokens for piece in self.batch)
