"""Run the live engine, simulate the same arrivals from its profile, and compare the latencies.

    python -m fastserve_mega.experiments.live_vs_simulated \
        --config configs/smollm2-135m-cpu.yaml --set parallel.pipeline=1 --json result.json

Measures a profile first (or takes one), sets the rate to a share of the rate at which the
simulation saturates, and sends Poisson arrivals of random token ids with fixed answer lengths.
Other work on the machine shows as a difference: the simulation knows the profile only.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from fastserve_mega import launcher
from fastserve_mega.bench.statistics import percentile
from fastserve_mega.coordinator.event_log import SchedulerSetup, StepCall
from fastserve_mega.coordinator.profile_file import load_profile
from fastserve_mega.experiments.live_run import arguments_of, run_live
from fastserve_mega.experiments.other_policies import simulate
from fastserve_mega.experiments.replay import replay
from fastserve_mega.models.architecture import load_architecture
from fastserve_mega.printing import FittedTable
from fastserve_mega.records import convert
from fastserve_mega.scheduling.cost_model import Profile
from fastserve_mega.scheduling.events import StepDone
from fastserve_mega.scheduling.kv.pool import PoolSizes
from fastserve_mega.simulator.engine_model import step_work
from fastserve_mega.simulator.profiled_engine import ProfiledEngine
from fastserve_mega.simulator.records import RequestRecord
from fastserve_mega.simulator.workload import RequestSpec, WorkloadConfig, make_requests
from fastserve_mega.system.config import Config
from fastserve_mega.system.config_file import load_config
from fastserve_mega.system.partition import split_layers


@dataclass(frozen=True)
class Comparison:
    """One statistic of both runs, seconds."""

    name: str
    live_s: float
    simulated_s: float

    @property
    def difference(self) -> float:
        """Deviation of the simulation from the live run, as a share of the live run."""
        return self.simulated_s / self.live_s - 1.0


@dataclass(frozen=True)
class StepTimes:
    """The steps of one kind, together."""

    kind: str
    steps: int
    live_s: float
    """From dispatch to result; with several stages also the wait for the step before."""
    expected_s: float
    """As the engine model has them, each alone on the ranks."""


def drain_rate(
    setup: SchedulerSetup, engine: ProfiledEngine, specs: Sequence[RequestSpec]
) -> float:
    """Return the requests per second when all are there from the beginning, to the last answer."""
    records = simulate(setup, engine, [spec._replace(arrival_s=0.0) for spec in specs])
    return len(records) / max(record.finish_s for record in records)


# --- the comparison ------------------------------------------------------------------------------


def compare(
    live: Sequence[RequestRecord], simulated: Sequence[RequestRecord]
) -> tuple[Comparison, ...]:
    """Return mean and P95 of both latencies."""
    metrics: dict[str, Callable[[RequestRecord], float]] = {
        "TTFT": lambda record: record.ttft_s,
        "JCT": lambda record: record.jct_s,
    }
    statistics: dict[str, Callable[[list[float]], float]] = {
        "mean": lambda values: sum(values) / len(values),
        "P95": lambda values: percentile(values, 95),
    }
    return tuple(
        Comparison(
            f"{metric} {statistic}",
            figure([value(record) for record in live]),
            figure([value(record) for record in simulated]),
        )
        for metric, value in metrics.items()
        for statistic, figure in statistics.items()
    )


def step_times(calls: Sequence[StepCall], engine: ProfiledEngine) -> tuple[StepTimes, ...]:
    """Sum up the steps by kind: as they ran, and as a fresh engine model has them."""
    work = {
        call.plan.step_id: step_work(call.plan.batch)
        for call in calls
        if call.plan and call.plan.batch
    }
    totals: dict[str, list[float]] = {"decode": [0, 0.0, 0.0], "with prefill": [0, 0.0, 0.0]}
    for event in (event for call in calls for event in call.events):
        if isinstance(event, StepDone):
            step = work[event.step_id]
            total = totals["decode" if step.tokens == step.decode_slices else "with prefill"]
            total[0] += 1
            total[1] += event.elapsed_s
            total[2] += sum(engine.stage_times(step))
    return tuple(StepTimes(name, int(n), live, model) for name, (n, live, model) in totals.items())


def render(comparisons: Sequence[Comparison]) -> FittedTable:
    table = FittedTable("", "live s", "simulated s", "difference")
    for row in comparisons:
        table.add_row(
            row.name, f"{row.live_s:.3f}", f"{row.simulated_s:.3f}", f"{row.difference:+.1%}"
        )
    return table


def draw_specs(options: argparse.Namespace) -> list[RequestSpec]:
    """Draw lengths, and Poisson arrivals at one request per second."""
    workload = {
        "source": options.lengths,
        "max_prompt_tokens": options.max_prompt,
        "max_total_tokens": options.max_total,
        "rate": 1.0,
        "num_requests": options.requests,
        "seed": options.seed,
    }
    return make_requests(convert(workload, WorkloadConfig), options.data)


def expected_setup(
    config: Config, profile: Profile, specs: Sequence[RequestSpec]
) -> SchedulerSetup:
    """Return what the live scheduler will be made of, as far as is known before the ranks are."""
    tokens = sum(spec.prompt_tokens + spec.output_tokens for spec in specs)
    return SchedulerSetup(
        scheduler=config.scheduler,
        swap=config.kv_cache.swap,
        pools=PoolSizes(config.kv_cache.device_blocks or tokens, 0, config.kv_cache.block_size),
        profile=profile,
        window=config.parallel.pipeline,
        first_step_id=0,
    )


def run(options: argparse.Namespace, profile_path: Path) -> dict[str, object]:
    sets = [*options.set, f"scheduler.profile={profile_path}"]
    config = load_config(options.config, sets)
    profile = load_profile(profile_path)
    num_layers = load_architecture(config.model.directory).num_layers
    layers = [len(stage) for stage in split_layers(num_layers, config.parallel)]
    specs = draw_specs(options)
    engine = ProfiledEngine(profile, layers)
    rate = options.load * drain_rate(expected_setup(config, profile, specs), engine, specs)
    specs = [spec._replace(arrival_s=spec.arrival_s / rate) for spec in specs]
    live = run_live(options.config, sets, specs)
    clients = live.clients
    engine = ProfiledEngine(profile, layers, clients.copy_block_s)
    sent = [
        spec._replace(arrival_s=record.arrival_s)
        for spec, record in zip(specs, clients.records, strict=True)
    ]
    simulated = simulate(live.setup, engine, sent, clients.delivery_s)
    comparisons = compare(clients.records, simulated)
    replayed = replay(live.setup.make_scheduler(), live.calls)
    steps = step_times(live.calls, ProfiledEngine(profile, layers))
    console = Console()
    run_s = max(record.finish_s for record in clients.records)
    console.print(f"{len(specs)} requests, {rate:.2f}/s, {run_s:.0f} s")
    console.print(render(comparisons))
    console.print(f"replay: {replayed.equal_plans} of {replayed.plans} plans equal")
    console.print(f"delivery: {clients.delivery_s * 1000:.1f} ms")
    if config.parallel.pipeline == 1:
        for row in steps:
            console.print(
                f"{row.steps} steps {row.kind}: {row.live_s:.1f} s, by the profile "
                f"{row.expected_s:.1f} s"
            )
    return {
        "stages": config.parallel.pipeline, "policy": config.scheduler.policy,
        "requests": len(specs), "load": options.load, "rate": rate, "seed": options.seed,
        "mean_prompt_tokens": sum(spec.prompt_tokens for spec in specs) / len(specs),
        "mean_output_tokens": sum(spec.output_tokens for spec in specs) / len(specs),
        "latencies": [{**asdict(row), "difference": row.difference} for row in comparisons],
        "plans": replayed.plans, "equal_plans": replayed.equal_plans,
        "delivery_s": clients.delivery_s, "steps": [asdict(row) for row in steps],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="YAML")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--data", type=Path, help="directory of length files of your own")
    parser.add_argument("--lengths", default="sharegpt", help="a CSV file, or one that is shipped")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--max-prompt", type=int, default=200, help="longer rows are left out")
    parser.add_argument("--max-total", type=int, default=320)
    parser.add_argument("--load", type=float, default=0.7, help="share of the saturation rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", type=Path, help="take this one instead of measuring")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        profile_path = options.profile or Path(directory) / "profile.json"
        if options.profile is None:
            sets = [*options.set, "coordinator.client_endpoint=tcp://127.0.0.1:0"]
            arguments = arguments_of(options.config, sets)
            if launcher.profile(load_config(options.config, sets), arguments, profile_path):
                return 1
        figures = run(options, profile_path)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
