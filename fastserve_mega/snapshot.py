"""What the scheduler is doing right now, as seen from outside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastserve_mega.types import RequestId

KvPlace = Literal["waiting", "resident", "hosted"]
"""Where a request's KV is: nowhere, in device blocks, in host blocks."""


@dataclass(frozen=True, slots=True)
class RequestView:
    """An unfinished request."""

    request_id: RequestId
    level: int
    """Of the queue, 0 is the highest."""
    place: KvPlace
    running: bool
    """A dispatched step computes it."""
    prompt_tokens: int
    output_tokens: int
    computed_tokens: int
    """Leading tokens whose KV exists."""
    waited_s: float
    """Since it arrived or last left a step; 0 while it is running."""


@dataclass(frozen=True, slots=True)
class PoolView:
    """Blocks of one pool, the null block not counted."""

    owned: int
    cached: int
    """Kept for their content without an owner."""
    capacity: int


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One scheduler and its memory. Counters count from the start of the server."""

    levels: tuple[int, ...]
    """Unfinished requests of each level, the highest first."""
    quanta_s: tuple[float, ...]
    """Of each level, seconds; empty for policies without quanta."""
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


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of the last few hundred requests, seconds; zero before the first."""

    mean: float = 0.0
    p50: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
