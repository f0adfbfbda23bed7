"""Servers beside each other: what each of their runs was disturbed by, and their ratios."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from fastserve_mega.printing import FittedTable
from fastserve_mega.process_tree import descendants

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Run:
    """What one server did with one load in one round."""

    setting: str
    """Of servers that are comparable."""
    load: str
    server: str
    round: int
    others: float
    """Cores that other processes used meanwhile."""
    summary: dict[str, Any]

    @property
    def is_whole(self) -> bool:
        """Whether all requests had their whole answer."""
        return bool(self.summary["completed"] == self.summary["requests"])


def cpu_seconds_of_others() -> float:
    """CPU time of all processes so far but this one and those below it.

    With that of the children they have waited for: what has ended is not lost.
    """
    own = {os.getpid(), *descendants(os.getpid())}
    total = 0
    for entry in _PROC.iterdir():
        if entry.name.isdigit() and int(entry.name) not in own:
            with suppress(OSError):  # it has ended
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                total += sum(map(int, fields[11:15]))
    return total / os.sysconf("SC_CLK_TCK")


def counted(runs: Sequence[Run], busy: float) -> list[Run]:
    """The runs that count: whole ones, quiet ones where there are any."""
    whole = [run for run in runs if run.is_whole]
    return [run for run in whole if run.others <= busy] or whole


def ratios(runs: Sequence[Run], baseline: Sequence[Run], busy: float) -> list[float]:
    """Throughput as a multiple of the baseline's in the same round, ascending."""
    of_round = {run.round: run.summary["output_tokens_per_s"] for run in counted(baseline, busy)}
    return sorted(
        run.summary["output_tokens_per_s"] / of_round[run.round]
        for run in counted(runs, busy)
        if run.round in of_round
    )


def _figures(runs: Sequence[Run]) -> list[str]:
    """Medians of throughput and latencies."""

    def middle(*path: str) -> str:
        values = []
        for run in runs:
            value: Any = run.summary
            for key in path:
                value = value.get(key, {})
            values += [value] if isinstance(value, float) else []
        return f"{median(values):.3g}" if values else "-"

    short = "short" if any("short" in run.summary["latency"] for run in runs) else "all"
    return [
        middle("output_tokens_per_s"),
        middle("latency", short, "ttft_s", "mean"),
        middle("latency", short, "ttft_s", "p95"),
        middle("latency", "long", "jct_s", "mean"),
        middle("latency", "all", "normalized_latency_s", "mean"),
    ]


def show(runs: Sequence[Run], baseline: str, busy: float, console: Console) -> None:
    """A table for each setting."""
    grouped: dict[str, dict[str, dict[str, list[Run]]]] = {}
    for run in runs:
        grouped.setdefault(run.setting, {}).setdefault(run.load, {}).setdefault(
            run.server, []
        ).append(run)
    for setting, loads in grouped.items():
        table = FittedTable(
            "load", "server", "runs", "output tokens/s", f"to {baseline} (least - most)",
            "TTFT of short, mean s", "P95 s", "JCT of long, mean s", "s/token", "others' cores",
            title=setting, text_columns=2,
        )  # fmt: skip
        for load, servers in loads.items():
            for server, of_server in servers.items():
                table.add_row(load, server, *_cells(of_server, servers.get(baseline, []), busy))
            table.add_section()
        console.print(table)


def _cells(runs: Sequence[Run], baseline: Sequence[Run], busy: float) -> list[str]:
    most = max(run.others for run in runs)
    mark = " busy" if most > busy else ""
    if not (good := counted(runs, busy)):
        errors = [error for run in runs for error in run.summary["errors"]]
        return ["0", str(errors[0]) if errors else "-"]
    found = ratios(runs, baseline, busy)
    told = f"{median(found):.2f} ({found[0]:.2f} - {found[-1]:.2f})" if found else "-"
    used = f"{len(good)} of {len(runs)}"
    throughput, *latencies = _figures(good)
    return [used, throughput, told, *latencies, f"{most:.2f}{mark}"]
