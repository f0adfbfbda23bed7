"""One request as the scheduler sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from fastserve_mega.types import BlockHash, RequestId


class Place(IntEnum):
    """Where the KV of an unfinished request is; each has exactly one."""

    WAITING = 0
    """Nowhere: it never ran, or its KV was dropped."""
    RESIDENT = 1
    """In device blocks, or on its way there."""
    HOSTED = 2
    """In host blocks only, or on its way there."""


@dataclass(slots=True, eq=False)
class Request:
    """Mutable state of an unfinished request; identity is equality."""

    request_id: RequestId
    prompt_tokens: int
    max_tokens: int
    priority: int
    arrival_number: int
    """Counts arrivals; breaks ties so that plans are reproducible."""
    known_tokens: int
    """Prompt and output tokens that exist; the KV of all of them is needed for the next one."""
    oracle_output_tokens: int | None = None

    place: Place = Place.WAITING
    computed_tokens: int = 0
    """Leading tokens whose KV exists, on the device or on the host."""
    in_flight_tokens: int = 0
    """Tokens a dispatched step is computing now; 0 when the request may be scheduled."""
    block_table: list[int] = field(default_factory=list)
    """Device blocks in order of position; empty when not resident."""
    told_blocks: int = 0
    """Leading entries of block_table that the workers know."""
    host_table: list[int] = field(default_factory=list)
    """Host blocks of the leading blocks, those being copied to included."""
    clean_blocks: int = 0
    """Leading blocks whose copy on the host is complete. Full blocks never change again, so they
    stay clean."""
    block_hashes: list[BlockHash] = field(default_factory=list)
    """Of the leading full blocks of its known tokens; empty when the prefix cache is off."""
    published_blocks: int = 0
    """Leading device blocks that others can find by their hashes."""
    cached_tokens: int = 0
    """Leading tokens whose KV was found in the prefix cache when it arrived."""
    dropped_tokens: int = 0
    """Computed tokens whose KV was dropped, until it is resident again."""
    unread_tokens: int = 0
    """Tokens it arrived with that no step has computed yet; a recomputation does not count."""
    copies: int = 0
    """Copies of its blocks that have not been reported done."""
    moving: bool = False
    """Being swapped out or in, and not to be scheduled until that is done."""
    sampled_since_admission: bool = False
    """Yielded a token since it last became resident. Until then its blocks are not taken away,
    so that each admission makes progress."""
    unpaid_s: float = 0.0
    """Time it has to run before its blocks are taken away, in return for having been recomputed."""
    passed_over: int = 0
    """Steps in which it found no memory since it last ran."""
    waiting_since: float = 0.0
    """When it arrived or last left a step, seconds."""
    ended: bool = False

    level: int = 0
    """Of the multi-level feedback queue, 0 is the highest."""
    level_entry: int = 0
    """Counts entries into levels: the order within a level."""
    charged_s: float = 0.0
    """Time of the steps it took part in since it entered its level."""
    watched: bool = False
    """Has an entry in the starvation heap."""

    @property
    def pending_tokens(self) -> int:
        """Tokens to compute before the next token can be sampled; 1 means decode."""
        return self.known_tokens - self.computed_tokens
