"""Figures of a benchmark for people and for programs."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from math import isnan
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from fastserve_mega import __version__
from fastserve_mega.bench.statistics import PERCENTILES, Record
from fastserve_mega.printing import FittedTable, print_sentence
from fastserve_mega.slo import Slo

Summary = dict[str, Any]


def show_run(summary: Summary, console: Console) -> None:
    """One run: what failed, throughput, and a table of latencies."""
    console.print(f"{summary['completed']} of {summary['requests']} requests completed")
    for error, count in summary["errors"].items():
        print_sentence(console, Text(f"{count} x {error}", style="red"))
    if not summary["completed"]:
        return
    print_sentence(
        console,
        f"{summary['duration_s']:.1f} s, {summary['requests_per_s']:.2f} requests/s, "
        f"{summary['output_tokens_per_s']:.1f} output tokens/s",
    )
    slo = Slo(**summary["slo"])
    print_sentence(
        console,
        f"{summary['goodput']:.1%} good (within {slo}), {summary['play']:.1%} without a token "
        f"later than that, largest gap {summary['max_gap_s']:.2f} s",
    )
    percentiles = (f"P{p}" for p in PERCENTILES)
    table = FittedTable("requests", "seconds", "mean", *percentiles, text_columns=2)
    for group, latencies in summary["latency"].items():
        for name, values in latencies.items():
            table.add_row(group, _label(name), *(f"{value:.4f}" for value in values.values()))
        table.add_section()
    worst = summary["slowest_long"]
    group = f"slowest {worst['requests']} of long"
    table.add_row(group, "JCT", f"{worst['jct_s']:.4f}")
    table.add_row(group, "normalized latency", f"{worst['normalized_latency_s']:.4f}")
    console.print(table)


def _label(name: str) -> str:
    label = name.removesuffix("_s").replace("_", " ")
    return label.upper() if label in {"ttft", "tpot", "jct"} else label


def show_comparison(runs: Sequence[Summary], console: Console) -> None:
    """All runs side by side."""
    table = FittedTable(
        "rate", "concurrency", "completed", "requests/s", "tokens/s", "TTFT mean", "TTFT P95",
        "TPOT mean", "TPOT P95", "JCT mean", "JCT P95", "JCT P99", "good", "play", "largest gap",
        title="all runs, latencies in seconds", text_columns=2,
    )  # fmt: skip
    for run in runs:
        summary = run["summary"]
        cells = [f"{summary['completed']}/{summary['requests']}"]
        if summary["completed"]:
            latency = summary["latency"]["all"]
            cells += [f"{summary[f'{name}_per_s']:.2f}" for name in ("requests", "output_tokens")]
            cells += [
                f"{latency[metric][value]:.3f}" if latency[metric] else ""
                for metric, value in (
                    ("ttft_s", "mean"), ("ttft_s", "p95"), ("tpot_s", "mean"), ("tpot_s", "p95"),
                    ("jct_s", "mean"), ("jct_s", "p95"), ("jct_s", "p99"),
                )
            ]  # fmt: skip
            cells += [f"{summary[name]:.3f}" for name in ("goodput", "play", "max_gap_s")]
        rate = "at once" if run["rate"] is None else f"{run['rate']:g}"
        table.add_row(rate, str(run["concurrency"] or "any"), *cells)
    console.print(table)


def plain_record(record: Record) -> dict[str, Any]:
    """A record for JSON, which knows no NaN."""
    return {k: None if isinstance(v, float) and isnan(v) else v for k, v in asdict(record).items()}


def environment() -> dict[str, Any]:
    """Where the figures come from; None for what cannot be found out."""
    try:
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        commit = ""
    cpu = None
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        names = [x for x in cpuinfo.read_text(encoding="utf-8").splitlines() if "model name" in x]
        cpu = names[0].partition(":")[2].strip() if names else None
    return {
        "version": __version__,
        "commit": commit.strip() or None,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu or platform.processor(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }


def cpu_seconds() -> float | None:
    """Time that all processes of the machine have used so far, all cores together."""
    if not (stat := Path("/proc/stat")).exists():
        return None
    user, nice, system, _, _, *interrupts = map(int, stat.read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
