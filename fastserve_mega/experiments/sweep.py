"""Searches over the request rate: where a system saturates, how much it serves in time; tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from msgspec.structs import replace
from rich.console import Console
from rich.table import Table

from fastserve_mega.simulator.config import SimulationConfig
from fastserve_mega.simulator.lengths import LengthTable
from fastserve_mega.simulator.main import simulate, with_policy, with_rate
from fastserve_mega.simulator.report import Report, summarize
from fastserve_mega.simulator.workload import draw_requests
from fastserve_mega.system.config import PolicyName

_ALL_AT_ONCE = 1e9
"""Requests per second: the whole workload has arrived before the first step."""
SEARCH_SPAN = 8.0
"""A search for a crossing gives up at the start times or divided by this."""


@dataclass(frozen=True, slots=True)
class Bound:
    """What a rate must keep to."""

    measure: Callable[[Report], float]
    limit: float


def backlog_rate(config: SimulationConfig, table: LengthTable, num_requests: int) -> float:
    """Return the requests per second that fcfs completes from an empty system with a long queue.

    As many requests again wait behind the measured ones, so that the batch stays full.
    """
    workload = replace(
        config.workload, rate=_ALL_AT_ONCE, speedup=1.0, warmup_requests=0,
        num_requests=num_requests, cooldown_requests=num_requests,
    )  # fmt: skip
    crowded = with_policy(replace(config, workload=workload), "fcfs")
    result = simulate(crowded, draw_requests(workload, table))
    return result.finished / result.elapsed_s


@dataclass(frozen=True, slots=True)
class RateSearch:
    """Runs of one system and one kind of request at many rates; each is made only once."""

    config: SimulationConfig
    table: LengthTable
    prompt_counts: tuple[tuple[float, int], ...]
    """(rate, requests of the run at that rate), linear between them."""
    tolerance: float = 0.02
    """Relative width of the interval in which a crossing is interpolated."""
    _reports: dict[tuple[PolicyName, float, int], Report] = field(default_factory=dict)

    def report(self, policy: PolicyName, rate: float, seed: int) -> Report:
        """Simulate one finite run."""
        key = (policy, rate, seed)
        if key not in self._reports:
            config = with_rate(with_policy(self.config, policy), rate)
            rates, counts = zip(*self.prompt_counts, strict=True)
            count = round(float(np.interp(rate, rates, counts)))
            workload = replace(config.workload, seed=seed, num_requests=count)
            result = simulate(config, draw_requests(workload, self.table))
            self._reports[key] = summarize(result, policy, rate)
        return self._reports[key]

    def max_rate(self, policy: PolicyName, seed: int, bound: Bound, start: float) -> float:
        """Find the highest rate before the measure first exceeds its limit.

        Rates grow by a quarter from `start` until they cross the limit; the crossing is then
        bisected, and interpolated linearly in what remains.

        Returns:
            Requests per second; at least `SEARCH_SPAN` times `start` when the limit holds even
            there, 0 when it holds nowhere.
        """
        measure, limit = bound.measure, bound.limit
        low = start
        while (low_value := measure(self.report(policy, low, seed))) > limit:
            if low < start / SEARCH_SPAN:
                return 0.0
            low /= 2
        high, high_value = low, low_value
        while high_value <= limit:
            if high >= start * SEARCH_SPAN:
                return high
            low, low_value = high, high_value
            high *= 1.25
            high_value = measure(self.report(policy, high, seed))
        while high - low > self.tolerance * low:
            middle = (low + high) / 2
            value = measure(self.report(policy, middle, seed))
            if value <= limit:
                low, low_value = middle, value
            else:
                high, high_value = middle, value
        return low + (high - low) * (limit - low_value) / (high_value - low_value)


@dataclass(frozen=True)
class Row:
    """One line of the paper's table, with its numbers (requests/s)."""

    config: str
    data: str
    paper_fcfs: float
    paper_fastserve: float


@dataclass(frozen=True)
class Line:
    """Rates (requests/s) that one system reached: a value per policy and seed."""

    name: str
    measure: str
    means: tuple[float, float]
    """Mean prompt and output tokens."""
    cap: float
    """Where the search ended; a finite run may stay within the limit at any rate."""
    rates: dict[str, list[float]]

    def mean(self, policy: str) -> float:
        return float(np.mean(self.rates[policy]))

    def spread(self, policy: str) -> str:
        values = self.rates[policy]
        if min(values) >= self.cap:
            return f"> {self.cap:.1f}"
        return f"{np.mean(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def add_columns(
    table: Table,
    policies: Sequence[PolicyName],
    *,
    with_paper: bool = False,
    baseline: PolicyName = "fcfs",
) -> None:
    """Add a column for each policy, and for its ratio to a baseline."""
    table.add_column("system", no_wrap=True)
    table.add_column("mean in/out", justify="right")
    for heading in (*policies, f"skip_join_mlfq / {baseline}"):
        table.add_column(heading, justify="right")
    if with_paper:
        table.add_column("paper: FCFS, FastServe, ratio", justify="right")


def add_line(
    table: Table,
    line: Line,
    policies: Sequence[PolicyName],
    row: Row | None = None,
    *,
    baseline: PolicyName = "fcfs",
    more: Sequence[str] = (),
) -> None:
    """Add the rates of one system, beside the paper's if it has them."""
    ratio = "-"
    if {"skip_join_mlfq", baseline} <= set(policies) and line.mean(baseline) > 0:
        ratio = f"{line.mean('skip_join_mlfq') / line.mean(baseline):.2f}"
    if row:
        paper_ratio = row.paper_fastserve / row.paper_fcfs
        more = (f"{row.paper_fcfs:g}, {row.paper_fastserve:g}, {paper_ratio:.2f}",)
    prompt, output = line.means
    rates = [line.spread(policy) for policy in policies]
    table.add_row(line.name, f"{prompt:.0f}/{output:.0f}", *rates, ratio, *more)


def print_tables(*tables: Table) -> None:
    """Print to the terminal, wide enough for all columns."""
    console = Console(width=max(Console().width, 180))
    for table in tables:
        console.print(table)
