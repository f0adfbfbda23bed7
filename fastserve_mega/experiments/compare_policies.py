"""`fastserve-mega compare-policies`: all policies on the standing set of workloads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress

from fastserve_mega.experiments.comparison_tables import print_comparison
from fastserve_mega.experiments.run_log import Run, RunLog
from fastserve_mega.experiments.standing_set import (
    STANDING_SET,
    StandingWorkload,
    at_rate,
    find_workload,
)
from fastserve_mega.printing import print_sentence
from fastserve_mega.simulator.main import simulate
from fastserve_mega.simulator.report import summarize
from fastserve_mega.slo import Slo

LOADS = (0.7, 0.9, 0.95, 1.2, 2.0)
QUICK_LOADS = (0.7, 0.95, 2.0)
WARMUP_SHARE = 0.2
COOLDOWN_SHARE = 0.5
"""Share of the measured requests, below saturation; beyond it all of a number are measured."""

Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareOptions:
    """What to compare, and how."""

    policies: tuple[str, ...]
    workloads: tuple[str, ...] = tuple(workload.name for workload in STANDING_SET)
    loads: tuple[float, ...] = ()
    """Over the saturation rate of fcfs; none takes `LOADS`, or `QUICK_LOADS`."""
    seeds: int | None = None
    """Runs of each case; None takes 5, or 1."""
    quick: bool = False
    """Few requests, one seed, three loads."""
    jobs: int = 1
    """Simulations side by side."""
    json_path: Path | None = None
    data: Path | None = None
    slo: Slo = dataclasses.field(default_factory=Slo)

    def count(self, workload: StandingWorkload) -> int:
        """Return how many requests of a workload are measured."""
        return workload.quick_requests if self.quick else workload.requests

    def runs(self) -> list[Run]:
        """Return all runs: a case's policies one after the other, the seeds last."""
        loads = self.loads or (QUICK_LOADS if self.quick else LOADS)
        seeds = self.seeds or (1 if self.quick else 5)
        return [
            Run(workload, load, policy, seed)
            for seed in range(seeds)
            for workload in self.workloads
            for load in loads
            for policy in self.policies
        ]


def run_comparison(options: CompareOptions) -> int:
    """Simulate what has not been yet, keep it, and print the tables.

    Returns:
        The exit status: 1 when a run failed.

    Raises:
        ValueError: a workload is not known, or the file of results is of another comparison.
        OSError: a file cannot be read or written.
    """
    workloads = [find_workload(name) for name in options.workloads]
    settings = {
        "quick": options.quick,
        "slo": dataclasses.asdict(options.slo),
        "data": str(options.data) if options.data else None,
    }
    log = RunLog(options.json_path, settings)
    rates = {
        each.name: partial(each.saturation_rate, options.count(each), options.data)
        for each in workloads
        if each.name not in log.saturation_rates
    }
    for name, rate in _run_all(rates, options.jobs, "saturation"):
        log.add_rate(name, rate)
    runs = options.runs()
    missing = {
        run: partial(measure, run, log.saturation_rates[run.workload], options)
        for run in runs
        if run not in log.results
    }
    for run, result in _run_all(missing, options.jobs, "policies"):
        log.add(run, result)
    results = {run: log.results[run] for run in runs}
    failed = {run: each["error"] for run, each in results.items() if "error" in each}
    print_comparison(
        workloads,
        {run: each for run, each in results.items() if run not in failed},
        log.saturation_rates,
        options.slo,
        Console(),
    )
    for run, error in failed.items():
        print_sentence(Console(), f"{run.workload} at {run.load:g}, {run.policy}: {error}")
    return 1 if failed else 0


def measure(run: Run, saturated_rate: float, options: CompareOptions) -> dict[str, Any]:
    """Return the report of a run, as JSON has it, or what went wrong."""
    workload = find_workload(run.workload)
    count = options.count(workload)
    steady = run.load < 1
    warmup = round(WARMUP_SHARE * count) if steady else 0
    cooldown = round(COOLDOWN_SHARE * count) if steady else 0
    rate = run.load * saturated_rate
    requests = at_rate(workload.draw(run.seed, warmup + count + cooldown, options.data), rate)
    config = workload.under(run.policy, warmup=warmup, cooldown=cooldown)
    try:
        result = simulate(config, requests, slo=options.slo)
        return dataclasses.asdict(summarize(result, run.policy, rate))
    except (RuntimeError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _run_all(
    tasks: Mapping[Key, Callable[[], Value]], jobs: int, title: str
) -> Iterator[tuple[Key, Value]]:
    """Yield the result of each task as it ends, in processes of their own if there are jobs."""
    if jobs == 1:
        yield from _track(((key, task()) for key, task in tasks.items()), len(tasks), title)
        return
    with ProcessPoolExecutor(jobs) as pool:
        # Before the progress bar's thread exists: processes are forked here.
        futures = {pool.submit(task): key for key, task in tasks.items()}
        ended = ((futures[each], each.result()) for each in as_completed(futures))
        yield from _track(ended, len(tasks), title)


def _track(
    pairs: Iterable[tuple[Key, Value]], total: int, title: str
) -> Iterator[tuple[Key, Value]]:
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        yield from progress.track(pairs, total=total, description=title)
