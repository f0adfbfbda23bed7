"""Rules that say which of many replicas a request goes to, side by side.

python -m fastserve_mega.experiments.placement --quick
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
from msgspec.structs import replace
from rich.console import Console

from fastserve_mega.experiments.placement_rules import RULES, SIMPLE_RULES
from fastserve_mega.experiments.placement_workloads import WORKLOADS, PlacementWorkload
from fastserve_mega.experiments.run_log import Run, RunLog
from fastserve_mega.experiments.systems import load_system
from fastserve_mega.printing import FittedTable
from fastserve_mega.scheduling.events import Arrived
from fastserve_mega.scheduling.placement import ExpectedWork
from fastserve_mega.simulator.config import SimulationConfig, make_replicas
from fastserve_mega.simulator.replica import Outage, SimulatedReplica
from fastserve_mega.simulator.report import Report, summarize
from fastserve_mega.simulator.simulation import Simulation
from fastserve_mega.slo import PAPER_SLOS
from fastserve_mega.system.hardware import Device
from fastserve_mega.types import RequestId

SLO = PAPER_SLOS[0]
_SYSTEM = "llama-3-8b-a100"
# NVIDIA L4 data sheet (2023): 24 GB GDDR6 at 300 GB/s, 242 TFLOPS BF16 with sparsity, half of it
# dense, PCIe Gen4 x16.
_L4 = Device(
    name="l4", memory_bytes=24 * 10**9, memory_bandwidth=300e9, peak_flops=121e12,
    host_bandwidth=32e9,
)  # fmt: skip
_SETTINGS = (
    "scheduler.policy=skip_join_mlfq",
    "scheduler.max_batch_size=32",
    "scheduler.max_batch_tokens=512",
    "kv_cache.host_memory_gb=8",
)
_BLOCKS = {"l4": 2150, "a100-40g": 8600}
"""KV blocks by device."""
_WARMUP, _COOLDOWN = 0.3, 0.15
"""Shares of a run's requests that are not measured."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is compared of one run."""

    ttft_p50_s: float
    ttft_p95_s: float
    ttft_p99_s: float
    goodput: float
    """Share of the requests within the SLO."""
    jct_mean_s: float
    prefilled: float
    """Tokens that were prefilled, over those of the prompts that came."""
    cpu_s: float
    """What the simulation took of a core."""


def build(workload: PlacementWorkload, count: int) -> list[SimulatedReplica]:
    """Return fresh replicas: one L4 each, or an A100 for some."""
    fast = round(workload.fast_share * count)
    made = [
        make_replicas(_configure(device, number))
        for device, number in (("a100-40g", fast), ("l4", count - fast))
        if number
    ]
    return [replica for group in made for replica in group]


def full_rate(workload: PlacementWorkload, replicas: int) -> float:
    """Return the requests per second at a load of 1.

    That is when the replicas would always be busy if they prefilled nothing twice, in full chunks,
    and decoded in full batches in the rest of the time.
    """
    requests = workload.generate(np.random.default_rng(98), 1_000, 100.0)
    known: dict[str, int] = {}
    new_tokens = 0
    for spec in requests:
        name = spec.session or spec.preamble
        new_tokens += spec.prompt_tokens - (known.get(name, 0) if name else 0)
        known[name] = spec.preamble_tokens or spec.prompt_tokens + spec.output_tokens
    answer = fmean(spec.output_tokens for spec in requests)
    mean = Arrived(RequestId(""), round(new_tokens / len(requests)), 1)
    work = [ExpectedWork(replica.scheduler) for replica in build(workload, replicas)]
    return sum(1 / (each.prefill_s(mean) + each.decode_s(answer)) for each in work)


def _configure(device: str, replicas: int) -> SimulationConfig:
    settings = (
        *_SETTINGS,
        f"kv_cache.device_blocks={_BLOCKS[device]}",
        f"parallel.data={replicas}",
    )
    config = load_system(_SYSTEM, "synthetic", settings)
    if device == "a100-40g":
        return config
    hardware = replace(config.deployment.hardware, device=_L4)
    return replace(config, deployment=replace(config.deployment, hardware=hardware))


def measure(
    workload: PlacementWorkload, run: Run, replicas: int, rate: float, count: int
) -> Outcome:
    """Simulate a run's rule and seed under `count` requests at `rate` requests per second."""
    begin_s = time.process_time()
    requests = workload.generate(np.random.default_rng(run.seed), count, rate)
    outages = []
    if workload.outage:
        begins, ends = (requests[round(share * count)].arrival_s for share in workload.outage)
        outages.append(Outage(0, begins, ends))
    result = Simulation(
        build(workload, replicas),
        requests,
        max_queued_requests=1_000_000,
        warmup=round(_WARMUP * count),
        cooldown=round(_COOLDOWN * count),
        make_placer=RULES[run.policy],
        slo=SLO,
        outages=outages,
    ).run()
    report = summarize(result, run.policy, rate)
    arrived = sum(spec.prompt_tokens for spec in requests)
    return _outcome(report, report.prefill_tokens / arrived, time.process_time() - begin_s)


def _outcome(report: Report, prefilled: float, cpu_s: float) -> Outcome:
    ttft = report.ttft_s
    return Outcome(
        ttft.p50, ttft.p95, ttft.p99, report.goodput, report.jct_s.mean, prefilled, cpu_s
    )


def run_all(options: argparse.Namespace, log: RunLog) -> dict[tuple[str, str], list[Outcome]]:
    """Simulate what the log does not have; outcomes of each seed by workload and rule."""
    outcomes: dict[tuple[str, str], list[Outcome]] = {}
    for replicas in options.replicas:
        for workload in (each for each in WORKLOADS if each.name in options.workloads):
            rate = options.load * full_rate(workload, replicas)
            for seed, rule in ((s, r) for s in range(options.seeds) for r in RULES):
                run = Run(f"{workload.name}, {replicas} replicas", options.load, rule, seed)
                if run not in log.results:
                    count = options.requests * replicas
                    done = measure(workload, run, replicas, rate, count)
                    log.add(run, asdict(done))
                outcome = Outcome(**log.results[run])
                outcomes.setdefault((run.workload, rule), []).append(outcome)
    return outcomes


def show(outcomes: dict[tuple[str, str], list[Outcome]], title: str) -> None:
    """Print a row for each workload and rule, and where a simple rule is better than ours."""
    table = FittedTable(
        "workload", "rule", "TTFT P50, s", "P95", "P99", "good, %", "JCT mean, s", "prefilled, %",
        title=title, text_columns=2,
    )  # fmt: skip
    for workload in dict.fromkeys(workload for workload, _ in outcomes):
        table.add_section()
        for rule in RULES:
            runs = outcomes[workload, rule]
            low, high = (limit(each.ttft_p95_s for each in runs) for limit in (min, max))
            spread = f" ({low:.2f}-{high:.2f})" if len(runs) > 1 else ""
            table.add_row(
                workload, rule,
                f"{fmean(each.ttft_p50_s for each in runs):.2f}",
                f"{fmean(each.ttft_p95_s for each in runs):.2f}{spread}",
                f"{fmean(each.ttft_p99_s for each in runs):.2f}",
                f"{100 * fmean(each.goodput for each in runs):.1f}",
                f"{fmean(each.jct_mean_s for each in runs):.2f}",
                f"{100 * fmean(each.prefilled for each in runs):.0f}",
            )  # fmt: skip
    Console().print(table)
    for workload in dict.fromkeys(workload for workload, _ in outcomes):
        ours = outcomes[workload, "ours"]
        for rule in SIMPLE_RULES:
            simple = outcomes[workload, rule]
            later_s = fmean(each.ttft_p95_s for each in ours) - fmean(
                each.ttft_p95_s for each in simple
            )
            fewer = fmean(each.goodput for each in simple) - fmean(each.goodput for each in ours)
            if later_s > 0 or fewer > 0:
                Console().print(
                    f"{workload}: {rule} is better by {max(later_s, 0):.3f} s of TTFT P95 and "
                    f"{max(100 * fewer, 0):.2f} % of the requests within the SLO"
                )


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the rules, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [workload.name for workload in WORKLOADS]
    parser.add_argument("--replicas", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--workloads", nargs="+", choices=names, default=names)
    parser.add_argument("--load", type=float, default=0.9)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=400, help="for each replica")
    parser.add_argument("--quick", action="store_true", help="16 replicas, one seed, 100 requests")
    parser.add_argument("--json", type=Path, help="keeps the runs; goes on where it stopped")
    options = parser.parse_args(arguments)
    if options.quick:
        options.replicas, options.seeds, options.requests = [16], 1, 100
    log = RunLog(options.json, {"requests": options.requests})
    outcomes = run_all(options, log)
    show(
        outcomes,
        f"load {options.load:g}, {options.requests} requests for each replica, seeds: "
        f"{options.seeds}; good: within {SLO}; prefilled: of the prompts' tokens",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
