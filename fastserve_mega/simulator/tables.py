"""The tables of `fastserve-mega simulate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from fastserve_mega.printing import FittedTable
from fastserve_mega.simulator.report import Distribution, Report
from fastserve_mega.slo import PAPER_SLOS


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
