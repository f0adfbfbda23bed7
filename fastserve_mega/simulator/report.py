"""What the records of a run say, as numbers, tables and JSON."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from fastserve_mega.printing import FittedTable
from fastserve_mega.simulator.records import RequestRecord, SimulationResult
from fastserve_mega.simulator.replica import CopyStats
from fastserve_mega.slo import PAPER_SLOS, Slo

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
    gap_s: Distribution
    """The largest gap between two tokens of each answer."""
    max_gap_s: float
    """The largest of all."""
    slo: Slo
    goodput: float
    """Share of the measured requests that met the SLO."""
    paper_goodputs: tuple[float, ...]
    """Share of them that met each of `PAPER_SLOS`."""
    play: float
    """Share of the measured requests none of whose tokens came later than the SLO's TTFT after the
    arrival, and its TPOT more for each token before it."""
    recomputed_share: float
    """Recomputed tokens over all that were computed."""
    swapped_tokens: int
    """Room of the blocks that were copied, in either direction."""
    client_tokens_per_s: dict[str, float]
    """Output tokens per second of waiting (JCT), by client; only of clients with a name."""
    fairness: float | None
    """Jain's index of those: 1 when all clients are served at the same pace, 1/n when one of n gets
    everything. None with fewer than two clients."""


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
        **_what_users_feel(result),
    )


def _what_users_feel(result: SimulationResult) -> dict[str, Any]:
    """The fields of a report about single tokens, promises, and clients."""
    records, slo = result.records, result.slo
    pace = _client_tokens_per_s(records)
    computed = result.decode_tokens + result.prefill_tokens
    return {
        "gap_s": distribution(record.largest_gap_s for record in records),
        "max_gap_s": max(record.largest_gap_s for record in records),
        "slo": slo,
        "goodput": _goodput(records, slo),
        "paper_goodputs": tuple(_goodput(records, each) for each in PAPER_SLOS),
        "play": fmean(slo.is_played(record.lateness_s) for record in records),
        "recomputed_share": result.recomputed_tokens / computed if computed else 0.0,
        "swapped_tokens": result.swapped_tokens,
        "client_tokens_per_s": pace,
        "fairness": jain_index(list(pace.values())) if len(pace) > 1 else None,
    }


def _goodput(records: Sequence[RequestRecord], slo: Slo) -> float:
    return fmean(slo.is_met(record.ttft_s, record.tpot_s) for record in records)


def _client_tokens_per_s(records: Sequence[RequestRecord]) -> dict[str, float]:
    tokens: Counter[str] = Counter()
    waited_s: dict[str, float] = {}
    for record in records:
        if record.client:
            tokens[record.client] += record.output_tokens
            waited_s[record.client] = waited_s.get(record.client, 0.0) + record.jct_s
    return {client: tokens[client] / waited_s[client] for client in sorted(tokens)}


def jain_index(shares: Sequence[float]) -> float:
    """Return how even shares are: from 1 / their number to 1."""
    return sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares))


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


def make_tables(reports: Sequence[Report], title: str) -> tuple[FittedTable, ...]:
    """Latencies, a line per measure and run; then promises kept, and work done, a line per run."""
    latencies = FittedTable(
        "policy", "rate", "seconds", "mean", "P50", "P95", "P99", title=title, text_columns=3
    )
    rejected = sum(report.rejected for report in reports)
    work = FittedTable(
        "policy", "rate", "slowest long JCT", "req/s", "tok/s", "busy", "batch", "preempted",
        "recomputed", "swapped", "exposed copies",
        title=f"{title}; {rejected} requests were rejected" if rejected else title,
    )  # fmt: skip
    for name, measure in _MEASURES.items():
        latencies.add_section()
        for report in reports:
            values = dataclasses.astuple(measure(report))
            latencies.add_row(*_name_of(report), name, *(f"{value:.3g}" for value in values))
    for report in reports:
        work.add_row(*_name_of(report), *_work_cells(report))
    return latencies, _promises(reports), work


def _promises(reports: Sequence[Report]) -> FittedTable:
    """Shares of the requests whose users had what was promised to them."""
    table = FittedTable(
        "policy", "rate", "good", "play",
        *(f"{slo.ttft_s:g} {slo.tpot_s:g} s" for slo in PAPER_SLOS), "largest gap",
        *(["fair"] if any(report.fairness is not None for report in reports) else []),
        title=f"good: share of requests within {reports[0].slo}; play: without a token later than "
        "that; then goodput at other limits",
        text_columns=2,
    )  # fmt: skip
    for report in reports:
        shares = (report.goodput, report.play, *report.paper_goodputs)
        fairness = "" if report.fairness is None else f"{report.fairness:.2f}"
        cells = (*(f"{share:.3f}" for share in shares), f"{report.max_gap_s:.3g} s", fairness)
        table.add_row(*_name_of(report), *(cell for cell in cells if cell))
    return table


_MEASURES: dict[str, Callable[[Report], Distribution]] = {
    "latency/token": lambda report: report.normalized_latency_s,
    "TTFT": lambda report: report.ttft_s,
    "TPOT": lambda report: report.tpot_s,
    "JCT": lambda report: report.jct_s,
    "largest gap": lambda report: report.gap_s,
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
        f"{report.recomputed_tokens} ({report.recomputed_share:.1%})",
        str(report.swapped_tokens),
        f"{copies.exposed_s:.2f} s",
    ]
