"""Tables of a comparison of policies: figures, ratios to fcfs, and where a policy falls short."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from rich.console import Console

from fastserve_mega.experiments.run_log import Run
from fastserve_mega.experiments.standing_set import StandingWorkload
from fastserve_mega.printing import FittedTable, print_sentence
from fastserve_mega.slo import Slo

BASELINE = "fcfs"
LEAST_THROUGHPUT = 0.97
MOST_RECOMPUTED = 2.0
LONGEST_GAP_S = 2.5
GOODPUT_NOISE = 0.5
"""Beyond these a policy is said to fall short of fcfs; the last is in % of the requests."""

# The 97.5 % quantiles of Student's distribution for 1, 2, … degrees of freedom.
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14)
_STUDENT_OF_MORE = 2.1

Result = Mapping[str, Any]
Case = tuple[str, float, str]
"""Workload, load, policy."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One measure of a run."""

    heading: str
    value: Callable[[Result], float]
    has_ratio: bool = True


FIGURES = (
    Figure("req/s", lambda result: result["requests_per_s"]),
    Figure("good", lambda result: 100 * result["goodput"]),
    Figure("play", lambda result: 100 * result["play"]),
    Figure("TTFT P95", lambda result: result["ttft_s"]["p95"]),
    Figure("JCT mean", lambda result: result["jct_s"]["mean"]),
    Figure("gap P99", lambda result: result["gap_s"]["p99"]),
    Figure("gap max", lambda result: result["max_gap_s"], has_ratio=False),
    Figure("again", lambda result: 100 * result["recomputed_share"], has_ratio=False),
)
BY_HEADING = {figure.heading: figure for figure in FIGURES}


def print_comparison(
    workloads: Sequence[StandingWorkload],
    results: Mapping[Run, Result],
    saturation_rates: Mapping[str, float],
    slo: Slo,
    console: Console,
) -> None:
    """Print a table for each workload and load, ratios for each workload, and the shortfalls."""
    cases: dict[Case, list[Result]] = {}
    for run, result in results.items():
        cases.setdefault((run.workload, run.load, run.policy), []).append(result)
    print_sentence(
        console,
        f"Times in seconds. good: % of requests within {slo}; play: % of requests without a token "
        "later than that; gap: the largest between two tokens of an answer; again: recomputed, % "
        "of all tokens computed; ±: 95 % interval of the mean over seeds.",
    )
    for workload in workloads:
        loads = dict.fromkeys(load for name, load, _ in cases if name == workload.name)
        for load in loads:
            rate = load * saturation_rates[workload.name]
            title = f"{workload.name} ({workload.about}) at {load:g}: {rate:.3g} requests/s"
            console.print(figures_table(_of(cases, workload.name, load), title))
        if (ratios := ratios_table(cases, workload.name)) is not None:
            console.print(ratios)
    console.print(shortfalls_table(cases))


def figures_table(policies: Mapping[str, Sequence[Result]], title: str) -> FittedTable:
    """Return the figures of all policies at one load."""
    table = FittedTable("policy", *(figure.heading for figure in FIGURES), title=title)
    for policy, results in policies.items():
        table.add_row(policy, *(cell([*map(figure.value, results)]) for figure in FIGURES))
    return table


def ratios_table(cases: Mapping[Case, Sequence[Result]], workload: str) -> FittedTable | None:
    """Return the means over those of fcfs; None when nothing can be compared with it."""
    figures = [figure for figure in FIGURES if figure.has_ratio]
    table = FittedTable(
        "load", "policy", *(figure.heading for figure in figures),
        title=f"{workload}: times {BASELINE}", text_columns=2,
    )  # fmt: skip
    has_rows = False
    for (name, load, policy), results in cases.items():
        base = cases.get((name, load, BASELINE))
        if name != workload or policy == BASELINE or base is None:
            continue
        has_rows = True
        table.add_row(f"{load:g}", policy, *(_ratio(figure, results, base) for figure in figures))
    return table if has_rows else None


def shortfalls_table(cases: Mapping[Case, Sequence[Result]]) -> FittedTable:
    """Return where a policy loses against fcfs more than it may, and what."""
    table = FittedTable(
        "workload", "load", "policy", "falls short of fcfs in",
        title=f"throughput below {LEAST_THROUGHPUT:g} of fcfs', more than {MOST_RECOMPUTED:g} % "
        f"recomputed, a gap of more than {LONGEST_GAP_S:g} s, or less goodput",
        text_columns=4,
    )  # fmt: skip
    for (workload, load, policy), results in cases.items():
        base = cases.get((workload, load, BASELINE))
        if base and policy != BASELINE and (found := list(shortfalls(results, base))):
            table.add_row(workload, f"{load:g}", policy, "; ".join(found))
    return table


def shortfalls(results: Sequence[Result], base: Sequence[Result]) -> Iterator[str]:
    """Yield what a policy loses against fcfs, by the means over the seeds."""

    def means(heading: str) -> tuple[float, float]:
        value = BY_HEADING[heading].value
        return fmean(map(value, results)), fmean(map(value, base))

    mine, theirs = means("req/s")
    if mine < LEAST_THROUGHPUT * theirs:
        yield f"throughput {mine / theirs:.2f}"
    mine, theirs = means("again")
    if mine > max(MOST_RECOMPUTED, theirs):
        yield f"recomputed {mine:.1f} %"
    mine, theirs = means("gap max")
    if mine > max(LONGEST_GAP_S, theirs):
        yield f"gap {_number(mine)} s"
    mine, theirs = means("good")
    if mine < theirs - GOODPUT_NOISE:
        yield f"good {mine:.1f} %, not {theirs:.1f}"


def cell(values: Sequence[float]) -> str:
    """Return a mean and the half of its 95 % interval, if there are several values."""
    mean, half = _number(fmean(values)), interval(values)
    return mean if half is None else f"{mean} ±{_number(half)}"


def interval(values: Sequence[float]) -> float | None:
    """Return half the 95 % interval of a mean, by Student's distribution; None of one value."""
    freedom = len(values) - 1
    if not freedom:
        return None
    quantile = _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else _STUDENT_OF_MORE
    return quantile * stdev(values) / math.sqrt(len(values))


def _of(
    cases: Mapping[Case, Sequence[Result]], workload: str, load: float
) -> dict[str, Sequence[Result]]:
    return {
        policy: results
        for (name, at, policy), results in cases.items()
        if name == workload and at == load
    }


def _ratio(figure: Figure, results: Sequence[Result], base: Sequence[Result]) -> str:
    below = fmean(map(figure.value, base))
    return f"{fmean(map(figure.value, results)) / below:.2f}" if below else "-"


def _number(value: float) -> str:
    """Return about three digits, in at most five characters below 100,000."""
    if value >= 100 or value == 0:
        return f"{value:.0f}"
    return f"{value:.3g}" if value >= 1 else f"{value:.3f}"
