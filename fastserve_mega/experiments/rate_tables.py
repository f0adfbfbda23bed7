"""Tables of the rates that policies reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from fastserve_mega.system.config import PolicyName


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
