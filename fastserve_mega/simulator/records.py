"""What a simulated run leaves behind."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastserve_mega.simulator.pipeline import CopyStats
from fastserve_mega.slo import Slo


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
