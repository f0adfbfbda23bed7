"""What the records of a run say, as numbers, a table and JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fastserve_mega.printing import FittedTable
from fastserve_mega.simulator.pipeline import CopyStats
from fastserve_mega.simulator.records import RequestRecord, SimulationResult

_LONG_QUANTILE = 0.75
_SLOWEST_FRACTION = 0.1


@dataclass(frozen=True, slots=True)
class Distribution:
    """One measure over requests, seconds."""

    mean: float
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class Report:
    """One run. Times in seconds; throughput is over the whole run, warm-up included."""

    policy: str
    rate: float | None
    """Requests per second offered; None for a trace."""
    requests: int
    """Measured."""
    rejected: int
    normalized_latency_s: Distribution
    """Job completion time per output token."""
    ttft_s: Distribution
    tpot_s: Distribution
    jct_s: Distribution
    slowest_long_jct_s: float
    """Mean of the slowest tenth of long requests: those in the top quarter of output lengths."""
    slowest_long_normalized_latency_s: float
    """Mean over the same requests."""
    requests_per_s: float
    output_tokens_per_s: float
    utilization: float
    """Fraction of the time in which the first stage computed."""
    elapsed_s: float
    mean_batch_size: float
    """Requests in a step."""
    steps: int
    decode_tokens: int
    prefill_tokens: int
    preemptions: int
    recomputed_tokens: int
    copies: CopyStats


def summarize(result: SimulationResult, policy: str, rate: float | None) -> Report:
    """The report of a run.

    Raises:
        ValueError: no request was measured.
    """
    records = result.records
    if not records:
        raise ValueError("no request was measured: all were rejected")
    slowest = _slowest_long(records)
    return Report(
        policy=policy,
        rate=rate,
        requests=len(records),
        rejected=result.rejected,
        normalized_latency_s=distribution(record.normalized_latency_s for record in records),
        ttft_s=distribution(record.ttft_s for record in records),
        tpot_s=distribution(record.tpot_s for record in records),
        jct_s=distribution(record.jct_s for record in records),
        slowest_long_jct_s=float(np.mean([record.jct_s for record in slowest])),
        slowest_long_normalized_latency_s=float(
            np.mean([record.normalized_latency_s for record in slowest])
        ),
        requests_per_s=result.finished / result.elapsed_s,
        output_tokens_per_s=result.output_tokens / result.elapsed_s,
        utilization=result.busy_s / result.elapsed_s,
        elapsed_s=result.elapsed_s,
        mean_batch_size=result.slices / result.steps,
        steps=result.steps,
        decode_tokens=result.decode_tokens,
        prefill_tokens=result.prefill_tokens,
        preemptions=result.preemptions,
        recomputed_tokens=result.recomputed_tokens,
        copies=result.copies,
    )


def distribution(values: Iterable[float]) -> Distribution:
    """Mean and percentiles (linear between neighbours)."""
    array = np.fromiter(values, dtype=np.float64)
    p50, p95, p99 = np.percentile(array, (50, 95, 99)).tolist()
    return Distribution(float(array.mean()), p50, p95, p99)


def _slowest_long(records: Sequence[RequestRecord]) -> list[RequestRecord]:
    threshold = float(np.quantile([record.output_tokens for record in records], _LONG_QUANTILE))
    long = [record for record in records if record.output_tokens >= threshold]
    long.sort(key=lambda record: record.jct_s, reverse=True)
    return long[: max(round(_SLOWEST_FRACTION * len(long)), 1)]


def to_json(reports: Sequence[Report]) -> str:
    """All figures of all runs, by field name."""
    return json.dumps([dataclasses.asdict(report) for report in reports], indent=2) + "\n"


def make_tables(reports: Sequence[Report], title: str) -> tuple[FittedTable, FittedTable]:
    """How long requests took, one line per measure and run; and the work done, one per run."""
    latencies = FittedTable(
        "policy", "rate", "seconds", "mean", "P50", "P95", "P99", title=title, text_columns=3
    )
    rejected = sum(report.rejected for report in reports)
    work = FittedTable(
        "policy", "rate", "slowest long JCT", "req/s", "tok/s", "busy", "batch", "preempted",
        "recomputed", "blocks swapped", "exposed copies",
        title=f"{title}; {rejected} requests were rejected" if rejected else title,
    )  # fmt: skip
    for name, measure in _MEASURES.items():
        latencies.add_section()
        for report in reports:
            values = dataclasses.astuple(measure(report))
            latencies.add_row(*_name_of(report), name, *(f"{value:.3g}" for value in values))
    for report in reports:
        work.add_row(*_name_of(report), *_work_cells(report))
    return latencies, work


_MEASURES: dict[str, Callable[[Report], Distribution]] = {
    "latency/token": lambda report: report.normalized_latency_s,
    "TTFT": lambda report: report.ttft_s,
    "TPOT": lambda report: report.tpot_s,
    "JCT": lambda report: report.jct_s,
}


def _name_of(report: Report) -> tuple[str, str]:
    return report.policy, "trace" if report.rate is None else f"{report.rate:.3g}"


def _work_cells(report: Report) -> list[str]:
    copies = report.copies
    return [
        f"{report.slowest_long_jct_s:.1f} s",
        f"{report.requests_per_s:.2f}",
        f"{report.output_tokens_per_s:.0f}",
        f"{report.utilization:.0%}",
        f"{report.mean_batch_size:.1f}",
        str(report.preemptions),
        str(report.recomputed_tokens),
        f"{copies.swapped_out_blocks + copies.swapped_in_blocks}",
        f"{copies.exposed_s:.2f} s",
    ]
