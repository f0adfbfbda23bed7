"""Plots of simulated runs; needs matplotlib (the extra `simulator`), imported when called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastserve_mega.simulator.records import SimulationResult
from fastserve_mega.simulator.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_latency_against_rate(reports: Sequence[Report], path: Path) -> None:
    """Mean and P95 normalized latency of each policy over the offered rate."""
    figure, (left, right) = _new_figure(columns=2)
    for policy in dict.fromkeys(report.policy for report in reports):
        line = sorted(
            (report.rate, report.normalized_latency_s)
            for report in reports
            if report.policy == policy and report.rate is not None
        )
        rates = [rate for rate, _ in line]
        left.plot(rates, [latency.mean for _, latency in line], marker="o", label=policy)
        right.plot(rates, [latency.p95 for _, latency in line], marker="o", label=policy)
    for axes, name in ((left, "mean"), (right, "P95")):
        _label(axes, "rate, requests/s", f"{name} normalized latency, s/token")
        axes.set_yscale("log")
    _save(figure, path)


def plot_cdfs(results: Mapping[str, SimulationResult], path: Path) -> None:
    """Distribution over requests of TTFT, JCT and normalized latency, one line per policy."""
    figure, axes_row = _new_figure(columns=3)
    measures = (
        ("ttft_s", "TTFT, s"), ("jct_s", "JCT, s"),
        ("normalized_latency_s", "normalized latency, s/token"),
    )  # fmt: skip
    for axes, (measure, label) in zip(axes_row, measures, strict=True):
        for policy, result in results.items():
            values = np.sort([getattr(record, measure) for record in result.records])
            fractions = np.arange(1, len(values) + 1) / len(values)
            axes.step(values, fractions, where="post", label=policy)
        _label(axes, label, "fraction of requests")
        axes.set_xscale("log")
    _save(figure, path)


def plot_timeline(result: SimulationResult, path: Path) -> None:
    """Requests of each level, and KV blocks in use, over time."""
    figure, (left, right) = _new_figure(columns=2)
    times = [point.time_s for point in result.timeline]
    levels = np.array([point.level_lengths for point in result.timeline]).T
    left.stackplot(times, levels, labels=[f"Q{level + 1}" for level in range(len(levels))])
    _label(left, "time, s", "unfinished requests")
    right.plot(times, [point.device_blocks_in_use for point in result.timeline], label="device")
    right.plot(times, [point.host_blocks_in_use for point in result.timeline], label="host")
    _label(right, "time, s", "KV blocks in use")
    _save(figure, path)


def _new_figure(columns: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * columns, 4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, columns, column + 1) for column in range(columns)]


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
