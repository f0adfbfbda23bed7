#!/usr/bin/env python3
"""Run the live engine, simulate the same arrivals from its profile, and compare the latencies.

    tools/live_vs_simulated.py --config configs/smollm2-135m-cpu.yaml --data DIRECTORY \
        --set parallel.pipeline=1 --json result.json

Measures a profile first (or takes one), sets the rate to a share of the rate at which the
simulation saturates, and sends Poisson arrivals of random token ids with fixed answer lengths.
Other work on the machine shows as a difference: the simulation knows the profile only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from replay_events import replay
from rich.console import Console
from rich.table import Table
from serving_statistics import percentile

from fastserve_mega import launcher
from fastserve_mega.client import AsyncClient
from fastserve_mega.config import load_config
from fastserve_mega.coordinator.event_log import SchedulerSetup, StepCall, read_event_log
from fastserve_mega.coordinator.profile_file import load_profile
from fastserve_mega.models.architecture import load_architecture
from fastserve_mega.scheduling.events import StepDone
from fastserve_mega.scheduling.memory import PoolSizes
from fastserve_mega.simulator.analytic_cost_model import step_work
from fastserve_mega.simulator.profiled_engine import ProfiledEngine
from fastserve_mega.simulator.records import RequestRecord
from fastserve_mega.simulator.simulation import Simulation
from fastserve_mega.simulator.workload import RequestSpec, WorkloadConfig, make_requests
from fastserve_mega.types import SamplingParams
from fastserve_mega.worker.partition import split_layers


@dataclass(frozen=True)
class Comparison:
    """One statistic of both runs, seconds."""

    name: str
    live_s: float
    simulated_s: float

    @property
    def difference(self) -> float:
        """Of the simulation from the live run, as a share."""
        return self.simulated_s / self.live_s - 1.0


@dataclass(frozen=True)
class LiveRun:
    """What the clients saw, and what the coordinator recorded."""

    records: list[RequestRecord]
    copy_block_s: float
    setup: SchedulerSetup
    calls: list[StepCall]


# --- the live engine -----------------------------------------------------------------------------


def run_live(config_path: str, sets: Sequence[str], specs: Sequence[RequestSpec]) -> LiveRun:
    """Start a deployment, send the requests at their times, and read its event log."""
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "events.jsonl"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        endpoint = f"tcp://127.0.0.1:{port}"
        more = (f"coordinator.client_endpoint={endpoint}", f"coordinator.event_log={log}")
        sets = [*sets, *more]
        config = load_config(config_path, sets)
        with launcher.Deployment(config, arguments_of(config_path, sets), http=False) as ranks:
            ranks.start()
            records, copy_block_s = asyncio.run(send_all(endpoint, specs))
        setup, calls = read_event_log(log)
        return LiveRun(records, copy_block_s, setup, list(calls))


def arguments_of(config_path: str, sets: Sequence[str]) -> list[str]:
    return ["--config", config_path, *(word for value in sets for word in ("--set", value))]


async def send_all(
    endpoint: str, specs: Sequence[RequestSpec]
) -> tuple[list[RequestRecord], float]:
    """The requests as their client saw them, and the seconds it takes to copy a KV block."""
    numbers = random.Random(0)
    async with AsyncClient(endpoint) as client:
        vocab_size = (await client.info()).vocab_size
        await client.tokenizer()  # its loading must not delay the first request
        prompts = [
            [numbers.randrange(vocab_size) for _ in range(spec.prompt_tokens)] for spec in specs
        ]
        begin = time.monotonic()
        records = await asyncio.gather(
            *(
                _send(client, prompt, spec, begin)
                for prompt, spec in zip(prompts, specs, strict=True)
            )
        )
        return list(records), _copy_block_s(await client.metrics())


async def _send(
    client: AsyncClient, prompt: Sequence[int], spec: RequestSpec, begin: float
) -> RequestRecord:
    params = SamplingParams(max_tokens=spec.output_tokens, temperature=0.0, ignore_eos=True)
    await asyncio.sleep(max(begin + spec.arrival_s - time.monotonic(), 0.0))
    sent_s = time.monotonic() - begin
    answer = await client.submit(prompt, params)
    await answer.take()
    first_token_s = time.monotonic() - begin
    await answer.wait()
    if len(answer.token_ids) != spec.output_tokens:
        raise RuntimeError(f"a request ended with {answer.finish_reason}, {answer.usage}")
    finish_s = time.monotonic() - begin
    return RequestRecord(spec.prompt_tokens, spec.output_tokens, sent_s, first_token_s, finish_s)


def _copy_block_s(metrics: str) -> float:
    values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))

    def both_ways(name: str) -> float:
        labels = ('{direction="in"}', '{direction="out"}')
        return sum(float(values.get(f"fastserve_{name}{label}", 0)) for label in labels)

    blocks = both_ways("swap_blocks_total")
    return both_ways("copy_seconds_sum") / blocks if blocks else 0.0


# --- its simulation ------------------------------------------------------------------------------


def simulate(
    setup: SchedulerSetup, engine: ProfiledEngine, specs: Sequence[RequestSpec]
) -> list[RequestRecord]:
    """The same scheduler on a virtual clock."""
    result = Simulation(
        setup.make_scheduler(),
        engine,
        specs,
        stages=setup.window,
        block_size=setup.pools.block_size,
        max_queued_requests=setup.scheduler.max_queued_requests,
    ).run()
    if result.rejected:
        raise RuntimeError(f"{result.rejected} requests do not fit")
    return list(result.records)


def saturation_rate(
    setup: SchedulerSetup, engine: ProfiledEngine, specs: Sequence[RequestSpec]
) -> float:
    """Requests per second when all of them are there from the beginning."""
    records = simulate(setup, engine, [spec._replace(arrival_s=0.0) for spec in specs])
    return len(records) / max(record.finish_s for record in records)


# --- the comparison ------------------------------------------------------------------------------


def compare(
    live: Sequence[RequestRecord], simulated: Sequence[RequestRecord]
) -> tuple[Comparison, ...]:
    """Mean and P95 of both latencies."""
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


def step_times(calls: Sequence[StepCall], engine: ProfiledEngine) -> tuple[float, float]:
    """Seconds of all steps together: as they ran, and as the engine model has them."""
    expected = {
        call.plan.step_id: engine.step_s(step_work(call.plan.batch))
        for call in calls
        if call.plan and call.plan.batch
    }
    done = [event for call in calls for event in call.events if isinstance(event, StepDone)]
    return sum(event.elapsed_s for event in done), sum(expected[event.step_id] for event in done)


def render(comparisons: Sequence[Comparison]) -> Table:
    table = Table()
    for name in ("", "live s", "simulated s", "difference"):
        table.add_column(name, justify="right" if name else "left")
    for row in comparisons:
        table.add_row(
            row.name, f"{row.live_s:.3f}", f"{row.simulated_s:.3f}", f"{row.difference:+.1%}"
        )
    return table


def draw_specs(options: argparse.Namespace) -> list[RequestSpec]:
    """Lengths, and Poisson arrivals at one request per second."""
    workload = WorkloadConfig(
        path=options.lengths,
        max_prompt_tokens=options.max_prompt,
        max_total_tokens=options.max_total,
        rate=1.0,
        num_requests=options.requests,
        seed=options.seed,
    )
    return make_requests(workload, options.data)


def run(options: argparse.Namespace, profile_path: Path) -> dict[str, object]:
    sets = [*options.set, f"scheduler.profile={profile_path}"]
    config = load_config(options.config, sets)
    profile = load_profile(profile_path)
    num_layers = load_architecture(config.model.directory).num_layers
    layers = [len(stage) for stage in split_layers(num_layers, config.parallel)]
    specs = draw_specs(options)
    tokens = sum(spec.prompt_tokens + spec.output_tokens for spec in specs)
    plenty = PoolSizes(config.kv_cache.device_blocks or tokens, 0, config.kv_cache.block_size)
    setup = SchedulerSetup(
        scheduler=config.scheduler, swap=config.kv_cache.swap, pools=plenty, profile=profile,
        window=config.parallel.pipeline, first_step_id=0,
    )  # fmt: skip
    rate = options.load * saturation_rate(setup, ProfiledEngine(profile, layers), specs)
    specs = [spec._replace(arrival_s=spec.arrival_s / rate) for spec in specs]
    live = run_live(options.config, sets, specs)
    engine = ProfiledEngine(profile, layers, live.copy_block_s)
    sent = [
        spec._replace(arrival_s=record.arrival_s)
        for spec, record in zip(specs, live.records, strict=True)
    ]
    comparisons = compare(live.records, simulate(live.setup, engine, sent))
    replayed = replay(live.setup.make_scheduler(), live.calls)
    steps_s, expected_s = step_times(live.calls, engine)
    console = Console()
    run_s = max(record.finish_s for record in live.records)
    console.print(f"{len(specs)} requests, {rate:.2f}/s, {run_s:.0f} s")
    console.print(render(comparisons))
    console.print(f"replay: {replayed.equal_plans} of {replayed.plans} plans equal")
    if config.parallel.pipeline == 1:
        console.print(f"steps: {steps_s:.1f} s, by the profile {expected_s:.1f} s")
    return {
        "stages": config.parallel.pipeline, "policy": config.scheduler.policy,
        "requests": len(specs), "load": options.load, "rate": rate, "seed": options.seed,
        "mean_prompt_tokens": sum(spec.prompt_tokens for spec in specs) / len(specs),
        "mean_output_tokens": sum(spec.output_tokens for spec in specs) / len(specs),
        "latencies": [{**asdict(row), "difference": row.difference} for row in comparisons],
        "plans": replayed.plans, "equal_plans": replayed.equal_plans,
        "steps_s": steps_s, "expected_steps_s": expected_s,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="YAML")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--data", type=Path, required=True, help="where the length files are")
    parser.add_argument("--lengths", default="sharegpt_8k_lengths.csv", help="the length file")
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
