"""One request as the scheduler sees it: its counts, its status, and parts for KV and queues."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final, overload

from fastserve_mega.types import BACKGROUND_PRIORITY, BlockHash, RequestId


class RequestStatus(IntEnum):
    """What can be done with a request now; `TRANSITIONS` says what can come after what."""

    WAITING = 0
    """It has no KV: it never ran, or its KV was dropped."""
    READY = 1
    """The KV is in device blocks, and a step may take it."""
    RUNNING = 2
    """A dispatched step computes it."""
    SWAPPING_OUT = 3
    """Preempted; its KV is on its way to host blocks."""
    SWAPPED = 4
    """Preempted; its KV is in host blocks."""
    SWAPPING_IN = 5
    """It has device blocks, and KV is on its way into them."""
    FINISHED = 6
    """Ended for whatever reason. Its blocks are free as soon as no step and no copy uses them."""


UNDER_WAY: Final = (
    RequestStatus.RUNNING,
    RequestStatus.SWAPPING_IN,
    RequestStatus.SWAPPING_OUT,
)
"""In a step, or with KV that is being copied: no step can take it now."""


class Place(IntEnum):
    """Where the KV of an unfinished request is, or where it goes: the queues are kept by it."""

    WAITING = 0
    RESIDENT = 1
    SWAPPED = 2


_S = RequestStatus

TRANSITIONS: Final[dict[RequestStatus, frozenset[RequestStatus]]] = {
    # Admitted, with prefix KV from the host if need be.
    _S.WAITING: frozenset({_S.READY, _S.SWAPPING_IN, _S.FINISHED}),
    # Scheduled; or preempted: copied to the host, clean there already, or dropped.
    _S.READY: frozenset({_S.RUNNING, _S.SWAPPING_OUT, _S.SWAPPED, _S.WAITING, _S.FINISHED}),
    # The step is done; WAITING when the ranks were lost with it.
    _S.RUNNING: frozenset({_S.READY, _S.WAITING, _S.FINISHED}),
    _S.SWAPPING_OUT: frozenset({_S.SWAPPED, _S.WAITING, _S.FINISHED}),
    # READY at once when the step itself waits for the copy, or all KV was still on the device.
    _S.SWAPPED: frozenset({_S.SWAPPING_IN, _S.READY, _S.WAITING, _S.FINISHED}),
    _S.SWAPPING_IN: frozenset({_S.READY, _S.WAITING, _S.FINISHED}),
    _S.FINISHED: frozenset(),
}

_PLACES: Final = (
    Place.WAITING,  # WAITING
    Place.RESIDENT,  # READY
    Place.RESIDENT,  # RUNNING
    Place.SWAPPED,  # SWAPPING_OUT
    Place.SWAPPED,  # SWAPPED
    Place.RESIDENT,  # SWAPPING_IN
)


class BlockHashes:
    """Behaves as a list that grows; no hash ends in a blank.

    They are one text, each as long as the longest: a list of those of a long prompt takes more than
    its tokens do, and thousands of prompts may wait.
    """

    __slots__ = ("_text", "_width")

    def __init__(self, hashes: Iterable[BlockHash] = ()) -> None:
        self._pack(list(hashes))

    def _pack(self, hashes: list[BlockHash]) -> None:
        self._width = max(map(len, hashes), default=1)
        self._text = "".join([each.ljust(self._width) for each in hashes])

    def __len__(self) -> int:
        return len(self._text) // self._width

    @overload
    def __getitem__(self, index: int) -> BlockHash: ...
    @overload
    def __getitem__(self, index: slice) -> list[BlockHash]: ...
    def __getitem__(self, index: int | slice) -> BlockHash | list[BlockHash]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} hashes, got index {index}")
        start = index * self._width
        return BlockHash(self._text[start : start + self._width].rstrip())

    def append(self, block_hash: BlockHash) -> None:
        if len(block_hash) > self._width:
            self._pack([*self[:], block_hash])
        else:
            self._text += block_hash.ljust(self._width)


@dataclass(slots=True)
class KvState:
    """The blocks of a request; written by `scheduling/kv/` only.

    ::

        tokens      0 ........................ num_computed_tokens ...... num_tokens
        block_table [published | computed ............ | room for what is scheduled]
        host_table  [clean .... | being copied to]
    """

    block_table: list[int] = field(default_factory=list)
    """Device blocks in order of position; empty when not resident."""
    num_sent_blocks: int = 0
    """Leading entries of `block_table` that the workers know."""
    host_table: list[int] = field(default_factory=list)
    """Host blocks of the leading blocks, those being copied to included."""
    num_swapped_blocks: int = 0
    """Blocks that it needs on the host while it has none on the device."""
    num_clean_blocks: int = 0
    """Leading blocks whose copy on the host is complete. Full blocks never change again, so they
    stay clean."""
    block_hashes: BlockHashes = field(default_factory=BlockHashes)
    """One for each leading full block of its tokens; none when the prefix cache is off."""
    num_published_blocks: int = 0
    """Leading device blocks that others can find by their hashes."""
    num_cached_tokens: int = 0
    """Leading tokens whose KV was found in the prefix cache when it arrived."""
    num_dropped_tokens: int = 0
    """Computed tokens whose KV was dropped, until it is resident again."""
    num_copies: int = 0
    """Copies of its blocks that have not been reported done."""
    resident_since: float = 0.0
    """When it got device blocks, seconds."""
    preempted_for: RequestId | None = None
    """The request that got its blocks when it was last preempted; None for expected arrivals."""


@dataclass(slots=True)
class QueueState:
    """Where a request stands in its queue; written by `scheduling/policies/` only."""

    level: int = 0
    """Level of the multi-level feedback queue, 0 is the highest."""
    entry: int = 0
    """Counts entries into levels: the order within a level."""
    charged_s: float = 0.0
    """Time of the steps it took part in since it entered its level."""
    steady_until: int = 0
    """While `Request.num_tokens` is below this, a token more does not change where it stands. 0 is
    always right; then the policy takes a closer look."""


class Turn(IntEnum):
    """Whether a request that has not run yet is before the policy."""

    HELD = 0
    """It waits in its client's line."""
    OFFERED = 1
    """The policy has it."""
    STARTED = 2
    """It has run."""


@dataclass(slots=True, eq=False)
class ClientShare:
    """What one client was served, and what it waits for; written by `FairShare` only."""

    name: str = ""
    weight: float = 1.0
    counter: float = 0.0
    """Tokens it was served, over its weight."""
    unfinished: int = 0
    """Its requests."""
    most_at_once: int = 0
    """So many of them have been let in at the same time."""
    was_turned_away: bool = False
    """It asked for more than that, which would have waited too long."""
    offered: dict[Request, None] = field(default_factory=dict)
    """Those that the policy has and that have not run, the oldest first."""
    num_held: int = 0
    """Those in its line."""
    line: list[tuple[Any, int, Request]] = field(default_factory=list)
    """A heap, with entries of aborted requests."""
    step: int = -1
    """The last step that looked at a request of it."""
    places_left: int = 0
    """Places of its share of that step that are left."""
    tokens: int = 0
    """That it was given of its share of that step."""
    tokens_left: int = 0
    """Tokens of its share that are left; below 0 when its first request there took more."""
    is_spent: bool = False
    """Nothing is left of its share of that step."""


@dataclass(slots=True, eq=False)
class Request:
    """Mutable state of a request; identity is equality.

    The counts are the scheduler's, except that `num_computed_tokens` is set by `kv/` as well when
    KV is found or dropped.
    """

    request_id: RequestId
    num_prompt_tokens: int
    max_tokens: int
    priority: int
    arrival_number: int
    """Counts arrivals; breaks ties so that plans are reproducible."""
    num_tokens: int
    """Prompt and output tokens that exist; the KV of all of them is needed for the next one."""
    oracle_output_tokens: int | None = None
    expected_output_tokens: int | None = None
    """What the client expects; None when it does not say."""
    session: str = ""
    """Requests of its client with the same one share the service they attained; empty is none."""
    share: ClientShare = field(default_factory=ClientShare)
    """Its client's."""
    num_of_share: int = 1
    """So many unfinished requests its client had when it came, itself included."""
    turn: Turn = Turn.OFFERED
    """Written by `FairShare` only."""
    offered_at: float = 0.0
    """When it arrived, or later came out of its client's line, seconds."""

    status: RequestStatus = RequestStatus.WAITING
    num_computed_tokens: int = 0
    """Leading tokens whose KV exists, on the device or on the host."""
    num_scheduled_tokens: int = 0
    """Tokens that a dispatched step computes; 0 outside of steps."""
    num_unread_tokens: int = 0
    """Tokens it arrived with that no step has computed yet; a recomputation does not count."""
    waiting_since: float = 0.0
    """When it was offered to the policy or last left a step, seconds."""
    has_progressed: bool = False
    """Yielded a token since it last became resident. Until then its blocks are not taken away,
    so that each admission makes progress."""
    preemption_credit_s: float = 0.0
    """Time it has to run before its blocks go to one that has none, in return for having been
    recomputed, or for copies that a step waits for."""

    steady_until: int = 0
    """While `num_computed_tokens` is below this, a step that takes it has only to count: it
    decodes, has room, and the workers know all of its blocks. 0 is always right; then a step takes
    a closer look."""
    num_passed_over: int = 0
    """Steps in which it found no memory since it last ran."""

    kv: KvState = field(default_factory=KvState)
    queue: QueueState = field(default_factory=QueueState)

    @property
    def num_pending_tokens(self) -> int:
        """Tokens to compute before the next token can be sampled; 1 means decode."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def is_background(self) -> bool:
        """Whether nobody waits for it, and all other work goes before it."""
        return self.priority >= BACKGROUND_PRIORITY

    @property
    def is_finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    @property
    def place(self) -> Place:
        """Which of the three queues it is in; unfinished requests only."""
        return _PLACES[self.status]
