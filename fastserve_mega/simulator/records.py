"""What is kept of a simulated run: while it runs, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fastserve_mega.scheduling.scheduler import Scheduler
from fastserve_mega.simulator.replica import CopyStats
from fastserve_mega.simulator.workload import RequestSpec
from fastserve_mega.slo import Slo


class SimulatedRequest:
    """An unfinished request: how much of its answer is left, and when its tokens came."""

    __slots__ = (
        "first_token_s", "harmless_gap_s", "index", "largest_gap_s", "last_token_s", "lateness_s",
        "output_left", "replica", "spec",
    )  # fmt: skip

    def __init__(self, spec: RequestSpec, index: int) -> None:
        self.spec = spec
        self.index = index
        self.replica = 0
        self.output_left = spec.output_tokens
        self.first_token_s = -1.0
        self.last_token_s = spec.arrival_s
        self.largest_gap_s = 0.0
        self.lateness_s = 0.0
        self.harmless_gap_s = -1.0
        """No shorter gap is the largest one, nor its token later than the one before."""

    @property
    def received_tokens(self) -> int:
        """Tokens of the answer that its client has."""
        return self.spec.output_tokens - self.output_left

    def observe_gap(self, now: float, pace_s: float) -> None:
        """Note the first token, or one that came after a longer gap than is harmless."""
        gap_s = now - self.last_token_s
        if self.first_token_s >= 0 and gap_s <= pace_s:
            self.largest_gap_s = self.harmless_gap_s = gap_s
            return
        waited_s = now - self.spec.arrival_s
        if self.first_token_s < 0:
            self.first_token_s = now
            self.lateness_s = waited_s
            self.harmless_gap_s = 0.0
            return
        before = self.received_tokens - 1
        self.largest_gap_s = max(self.largest_gap_s, gap_s)
        self.lateness_s = max(self.lateness_s, waited_s - pace_s * before)
        self.harmless_gap_s = pace_s

    def record(self, finish_s: float) -> RequestRecord:
        """What is left of it when it ends."""
        spec = self.spec
        return RequestRecord(
            spec.prompt_tokens, spec.output_tokens, spec.arrival_s, self.first_token_s, finish_s,
            self.largest_gap_s, self.lateness_s, spec.client,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One finished request; times in seconds of the virtual clock."""

    prompt_tokens: int
    output_tokens: int
    arrival_s: float
    first_token_s: float
    finish_s: float
    largest_gap_s: float
    """Longest time between two tokens of the answer that follow each other; 0 for a single one."""
    lateness_s: float
    """The most by which a token came after the arrival and, for each token before it, the pace that
    was promised."""
    client: str = ""
    """The client; empty when the workload does not say."""

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first; 0 for a single token."""
        return (self.finish_s - self.first_token_s) / max(self.output_tokens - 1, 1)

    @property
    def jct_s(self) -> float:
        """Job completion time."""
        return self.finish_s - self.arrival_s

    @property
    def normalized_latency_s(self) -> float:
        """Job completion time per output token (the paper's metric, section 6.1)."""
        return self.jct_s / self.output_tokens


@dataclass(frozen=True, slots=True)
class TimelinePoint:
    """The state of the scheduler after a dispatch."""

    time_s: float
    level_lengths: tuple[int, ...]
    """Unfinished requests of each level, the highest first."""
    device_blocks_in_use: int
    host_blocks_in_use: int
    batch_size: int


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """What happened in a run."""

    records: tuple[RequestRecord, ...]
    """Measured requests in order of arrival."""
    rejected: int
    """Requests that exceed the queue or the context, or could never fit into memory."""
    elapsed_s: float
    """Virtual time from the first arrival to the end of the run."""
    steps: int
    slices: int
    """Requests in all steps together."""
    decode_tokens: int
    """Scheduled in slices of one token."""
    prefill_tokens: int
    """Scheduled in longer slices, recomputed ones included."""
    output_tokens: int
    """Yielded by all requests, the unmeasured ones included."""
    finished: int
    """Requests, the unmeasured ones included."""
    busy_s: float
    """Time the first stage computed; of several replicas the mean."""
    preemptions: int
    recomputed_tokens: int
    copies: CopyStats
    timeline: tuple[TimelinePoint, ...]
    swapped_tokens: int = 0
    """Room of the blocks that were copied, in either direction."""
    slo: Slo = field(default_factory=Slo)
    """The pace that the lateness of the records is measured by."""


class Timeline:
    """Points of one run, of all replicas together."""

    def __init__(self, schedulers: Sequence[Scheduler], interval_s: float | None) -> None:
        """Begin without points; `interval_s` is the least time between two, None records none."""
        self._schedulers = schedulers
        self._interval_s = interval_s
        self.points: list[TimelinePoint] = []

    def observe(self, batch_size: int, now: float) -> None:
        """A step was dispatched."""
        points, interval_s = self.points, self._interval_s
        if interval_s is None or (points and now < points[-1].time_s + interval_s):
            return
        levels = zip(*(each.level_lengths() for each in self._schedulers), strict=True)
        devices = [each.memory.device for each in self._schedulers]
        hosts = [each.memory.host for each in self._schedulers]
        points.append(
            TimelinePoint(
                now,
                tuple(sum(lengths) for lengths in levels),
                sum(pool.capacity - pool.free_count for pool in devices),
                sum(pool.capacity - pool.free_count for pool in hosts),
                batch_size,
            )
        )
