"""Policies below saturation, in the steady state, and under a real trace, on the simulator.

    python -m fastserve_mega.experiments.steady_state [--quick]

Beyond saturation a finite run flatters any policy that lets long jobs wait, so
`fastserve_mega.experiments.paper` needs this beside it: 0.7, 0.8, 0.9 and 0.95 of the rate that
fcfs completes when there is always more to do; at least 2,000 requests are measured after a
warm-up, and requests keep arriving until the last of those has finished. Distances are to srpt,
which knows the true output lengths.

The Azure conversation trace is replayed at the speed at which fcfs begins to queue: there its mean
time to first token is twice what it is at a quarter of that speed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from msgspec.structs import replace
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fastserve_mega.experiments.sweep import backlog_rate
from fastserve_mega.experiments.systems import load_system
from fastserve_mega.simulator.config import SimulationConfig
from fastserve_mega.simulator.lengths import LengthTable
from fastserve_mega.simulator.main import simulate, with_policy
from fastserve_mega.simulator.report import Report, make_tables, summarize, to_json
from fastserve_mega.simulator.workload import draw_requests, load_lengths
from fastserve_mega.system.config import PolicyName

DESCRIPTION = "Policies below saturation, in the steady state, and under a real trace, simulated."
POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)
LOADS = (0.7, 0.8, 0.9, 0.95)
QUEUEING_TTFT_RATIO = 2.0
LIGHT_LOAD = 0.25
SPEEDUP_STEP = 1.1
FASTEST = 100.0


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    parser.add_argument("--data", type=Path, metavar="DIR", help="of length files of your own")
    parser.add_argument("--quick", action="store_true", help="a fifth of the requests")
    parser.add_argument("--config", default="opt-13b-a100", help="deployment for the loads")
    parser.add_argument("--trace", default="llama-3-8b-h200", help="deployment for the trace")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures here")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="SECTION.FIELD=VALUE",
        help="override one value of both configurations",
    )  # fmt: skip
    options = parser.parse_args(argv)
    share = 0.2 if options.quick else 1.0
    reports = []
    if options.config:
        config = load_system(options.config, "paper-sharegpt", options.overrides)
        reports += loads(config, options.data, options.policies, share)
    if options.trace:
        config = load_system(options.trace, "azure-conv-2023", options.overrides)
        reports += trace(config, options.data, options.policies, share)
    if options.json:
        options.json.write_text(to_json(reports), encoding="utf-8")


def loads(
    config: SimulationConfig, data: Path | None, policies: Sequence[PolicyName], share: float
) -> list[Report]:
    """Simulate all policies at fractions of the saturation rate."""
    lengths = load_lengths(config.workload, data)
    saturation = backlog_rate(config, lengths, num_requests=round(1000 * share))
    reports = []
    for load in LOADS:
        workload = replace(
            config.workload, rate=load * saturation, warmup_requests=round(500 * share),
            num_requests=round(2000 * share), cooldown_requests=round(1000 * share),
        )  # fmt: skip
        name = f"{config.deployment.model.name}: {load:.2f} of {saturation:.2f} requests/s"
        at_load = run_policies(replace(config, workload=workload), lengths, policies, name)
        show(at_load, name)
        reports += at_load
    return reports


def trace(
    config: SimulationConfig, data: Path | None, policies: Sequence[PolicyName], share: float
) -> list[Report]:
    """Simulate all policies on a trace, at the speed where fcfs begins to queue."""
    workload = config.workload
    workload = replace(
        workload,
        warmup_requests=round(workload.warmup_requests * share),
        num_requests=round(workload.num_requests * share),
        cooldown_requests=round(workload.cooldown_requests * share),
    )
    lengths = load_lengths(workload, data)
    speedup = queueing_speedup(replace(config, workload=workload), lengths)
    config = replace(config, workload=replace(workload, speedup=speedup))
    name = f"{config.deployment.model.name}: {lengths.origin} at {speedup:.2f} times its own speed"
    reports = run_policies(config, lengths, policies, name)
    show(reports, name)
    return reports


def queueing_speedup(config: SimulationConfig, lengths: LengthTable) -> float:
    """Find how fast the trace is replayed when fcfs begins to queue."""
    speedup = 1.0
    while speedup < FASTEST:
        busy, light = (_fcfs_ttft_s(config, lengths, speedup * load) for load in (1.0, LIGHT_LOAD))
        if busy >= QUEUEING_TTFT_RATIO * light:
            return speedup
        speedup *= SPEEDUP_STEP
    raise SystemExit(f"fcfs does not queue even at {FASTEST:g} times the trace's speed")


def _fcfs_ttft_s(config: SimulationConfig, lengths: LengthTable, speedup: float) -> float:
    workload = replace(config.workload, speedup=speedup)
    fcfs = with_policy(replace(config, workload=workload), "fcfs")
    return summarize(simulate(fcfs, draw_requests(workload, lengths)), "fcfs", None).ttft_s.mean


def run_policies(
    config: SimulationConfig, lengths: LengthTable, policies: Sequence[PolicyName], name: str
) -> list[Report]:
    """Simulate the same requests under each policy."""
    requests = draw_requests(config.workload, lengths)
    reports = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for policy in progress.track(policies, description=name):
            result = simulate(with_policy(config, policy), requests)
            reports.append(summarize(result, policy, config.workload.rate))
    return reports


def show(reports: Sequence[Report], name: str) -> None:
    """Print all figures, and how far each policy is from the oracle."""
    console = Console()
    for view in make_tables(reports, name):
        console.print(view)
    oracle = next((report for report in reports if report.policy == "srpt"), None)
    if oracle is None:
        return
    table = Table(title=f"{name}: times of srpt")
    for heading in ("policy", "mean norm. latency", "mean TTFT", "mean JCT", "P95 JCT"):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for report in reports:
        pairs = (
            (report.normalized_latency_s.mean, oracle.normalized_latency_s.mean),
            (report.ttft_s.mean, oracle.ttft_s.mean),
            (report.jct_s.mean, oracle.jct_s.mean),
            (report.jct_s.p95, oracle.jct_s.p95),
        )
        table.add_row(report.policy, *(f"{mine / best:.2f}" for mine, best in pairs))
    console.print(table)


if __name__ == "__main__":
    main()
