"""What the scheduler is doing right now, as seen from outside."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from fastserve_mega.records import OpenRecord
from fastserve_mega.types import RequestId

KvPlace = Literal["waiting", "resident", "swapped"]
"""Where a request's KV is: nowhere, in device blocks, in host blocks."""


class RequestView(OpenRecord, frozen=True):
    """An unfinished request."""

    request_id: RequestId
    level: int
    """Level of the queue, 0 is the highest."""
    place: KvPlace
    running: bool
    """A dispatched step computes it."""
    num_prompt_tokens: int
    num_output_tokens: int
    num_computed_tokens: int
    """Leading tokens whose KV exists."""
    waited_s: float
    """Since it arrived or last left a step; 0 while it is running."""


class PoolView(OpenRecord, frozen=True):
    """Blocks of one pool, the null block not counted."""

    owned: int
    cached: int
    """Kept for their content without an owner."""
    capacity: int


class ReplicaView(OpenRecord, frozen=True):
    """One scheduler and its memory. Counters count from the start of the server."""

    levels: tuple[int, ...]
    """Unfinished requests of each level, the highest first."""
    quanta_s: tuple[float, ...]
    """The quantum of each level, seconds; empty for policies without quanta."""
    requests: tuple[RequestView, ...]
    """The first ones by priority, and all that are running."""
    device: PoolView
    host: PoolView
    steps_in_flight: int
    preemptions: int
    swapped_out_blocks: int
    swapped_in_blocks: int
    recomputed_tokens: int
    prefix_queried_tokens: int
    prefix_hit_tokens: int
    level_names: tuple[str, ...] = ()
    """What the policy calls the levels; empty for numbers."""


class Percentiles(OpenRecord, frozen=True):
    """Seconds of the last few hundred requests, by nearest rank; zero before the first."""

    mean: float = 0.0
    p50: float = 0.0
    p95: float = 0.0
    p99: float = 0.0

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Percentiles:
        """Summarize measurements."""
        ordered = sorted(seconds)
        if not ordered:
            return cls()

        def at(share: float) -> float:
            return ordered[min(int(share * len(ordered)), len(ordered) - 1)]

        return cls(sum(ordered) / len(ordered), at(0.5), at(0.95), at(0.99))
