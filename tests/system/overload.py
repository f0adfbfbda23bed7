"""Offer a deployment several times what it can serve, and check that it comes out whole.

    python -m tests.system.overload --seconds 300 --set kv_cache.host_blocks=0

Measures the capacity with a closed loop, then sends Poisson arrivals at `--load` times that:
MT-bench prompts, a third of them behind a common prefix; answer lengths like Alpaca's; a tenth
is cancelled half way, a tenth has a time limit. The pools are small and the queue is bounded. Every
ten seconds the resident memory of all server processes and the pools are looked at.

Exit status 1 when a request is lost, hangs or ends with an error, a process ends, a block stays
owned, or memory grows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastserve_mega.client import AsyncClient
from fastserve_mega.launcher import Deployment
from fastserve_mega.simulator.lengths import read_source
from fastserve_mega.system.config_file import load_config
from fastserve_mega.text.tokenizer import Tokenizer

from .check_swapping import PROMPTS, read_prompts
from .overload_checks import (
    Finding,
    Outcome,
    Sample,
    Workload,
    check,
    finished_requests,
    parse_metrics,
    samples_of_run,
)
from .overload_clients import (
    SAMPLE_INTERVAL_S,
    Capacity,
    measure_capacity,
    offer,
    open_clients,
    settled_sample,
    take_sample,
)
from .server_processes import resident_bytes

CONFIG = Path(__file__).parents[2] / "configs" / "smollm2-135m-cpu.yaml"
SETTINGS = (
    "parallel.pipeline=1",
    "kv_cache.device_blocks=128",
    "scheduler.max_queued_requests=64",
)
"""One rank, a device pool that a few requests fill, and a queue that overflows."""
PREFIX = (
    "You answer the questions of the visitors of a museum of technology. Be friendly and exact, "
    "say so when you do not know something, never make up names or years, and keep to the point. "
    "Explain technical terms when you use them for the first time, and offer one thing to look at "
    "in the museum that has to do with the question.\n"
)
CLIENTS = 4
_PROMPTS = 160


@dataclass(frozen=True)
class Run:
    """All that is told of an overload."""

    capacity: Capacity
    rate: float
    """Requests per second that were offered."""
    outcomes: list[Outcome]
    samples: list[Sample]
    metrics: dict[str, float]
    """Metrics of the server at the end."""
    findings: list[Finding]


def read_workload(data: Path | None, lengths: str, longest_answer: int, model: Path) -> Workload:
    """Prompts, and answer lengths of a source that the simulator knows."""
    outputs = read_source(lengths, data, where={}, with_times=False).lengths[:, 1].tolist()
    return Workload(
        prompts=read_prompts(PROMPTS, model, _PROMPTS),
        prefix=Tokenizer(model).encode(PREFIX),
        answer_lengths=[min(tokens, longest_answer) for tokens in outputs if tokens > 0],
    )


async def overload(
    deployment: Deployment, endpoint: str, workload: Workload, options: argparse.Namespace
) -> Run:
    """Measure, overload, wait for the ends, and check."""
    rng = random.Random(options.seed)
    async with open_clients(endpoint, CLIENTS) as clients:
        calm, disturbed = (workload.draw(rng, disturb=disturb) for disturb in (False, True))
        capacity = await measure_capacity(clients, calm, options.measure, options.concurrency)
        rate = options.load * capacity.requests_per_s
        processes = list(resident_bytes(os.getpid()))
        ended_before = finished_requests(parse_metrics(await clients[0].metrics()))
        begin = time.monotonic()
        samples: list[Sample] = []
        sampling = asyncio.create_task(_sample(deployment, clients[0], begin, samples))
        tasks = await offer(clients, disturbed, rate=rate, seconds=options.seconds, rng=rng)
        _, hung = await asyncio.wait(tasks, timeout=options.limit)
        for task in hung:
            task.cancel()
        outcomes = list(await asyncio.gather(*tasks))
        if sampling.done():
            sampling.result()  # a process has ended
        sampling.cancel()
        samples.append(await settled_sample(clients[0], begin, options.limit))
        metrics = parse_metrics(await clients[0].metrics())
    findings = check(
        outcomes,
        samples,
        seconds=options.seconds,
        counted_ends=finished_requests(metrics) - ended_before,
        processes_before=processes,
        growth_limit_bytes=int(options.growth_limit * 2**20),
    )
    return Run(capacity, rate, outcomes, samples, metrics, findings)


async def _sample(
    deployment: Deployment, client: AsyncClient, begin: float, samples: list[Sample]
) -> None:
    while True:
        deployment.check()
        samples.append(await take_sample(client, begin))
        await asyncio.sleep(SAMPLE_INTERVAL_S)


def run_deployment(options: argparse.Namespace) -> Run:
    """Start the server, overload it, and stop it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    sets = [*SETTINGS, *options.set, f"coordinator.client_endpoint={endpoint}"]
    config = load_config(options.config, sets)
    words = (word for value in sets for word in ("--set", value))
    model = config.model.directory
    workload = read_workload(options.data, options.lengths, options.longest_answer, model)
    with Deployment(config, ["--config", str(options.config), *words], http=False) as deployment:
        deployment.start()
        return asyncio.run(overload(deployment, endpoint, workload, options))


def render(run: Run, seconds: float) -> list[Table]:
    """Ends, memory and findings."""
    ends = Table("reason", "requests", title=f"{len(run.outcomes)} requests, {run.rate:.2f}/s")
    for reason, count in Counter(outcome.reason for outcome in run.outcomes).most_common():
        ends.add_row(reason, str(count))
    memory = Table(title="resident memory, MiB")
    during = samples_of_run(run.samples, seconds)
    moments = {
        "start": run.samples[0], "a fifth": during[0], "end": during[-1], "after": run.samples[-1]
    }  # fmt: skip
    for name in ("process", *(f"{name} ({each.at_s:.0f} s)" for name, each in moments.items())):
        memory.add_column(name)
    for process in run.samples[0].resident_bytes:
        sizes = (each.resident_bytes.get(process, 0) for each in moments.values())
        memory.add_row(process, *(f"{size / 2**20:.1f}" for size in sizes))
    findings = Table("", "", "holds", title="findings")
    for finding in run.findings:
        findings.add_row(finding.what, finding.figures, "yes" if finding.holds else "NO")
    return [ends, memory, findings]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=CONFIG, metavar="YAML")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--data", type=Path, help="directory of length files of your own")
    parser.add_argument("--lengths", default="alpaca", help="of the answers, as in a workload file")
    parser.add_argument("--longest-answer", type=int, default=256, help="tokens")
    parser.add_argument("--seconds", type=float, default=300.0, help="of overload")
    parser.add_argument("--load", type=float, default=3.0, help="times the capacity")
    parser.add_argument("--measure", type=float, default=20.0, help="seconds, for the capacity")
    parser.add_argument("--concurrency", type=int, default=32, help="while it is measured")
    parser.add_argument("--limit", type=float, default=120.0,
                        help="seconds within which all must end after that")  # fmt: skip
    parser.add_argument("--growth-limit", type=float, default=16.0,
                        help="MiB from a fifth of the time to its end")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write everything here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    run = run_deployment(options)
    console = Console(width=max(Console().width, 120))
    console.print(
        f"capacity {run.capacity.requests_per_s:.2f} requests/s, "
        f"{run.capacity.tokens_per_s:.0f} tokens/s"
    )
    console.print(*render(run, options.seconds))
    for name in ("preemptions_total", "recomputed_tokens_total"):
        console.print(f"{name}: {run.metrics[name]:.0f}")
    if options.json:
        options.json.write_text(json.dumps(asdict(run), indent=1) + "\n", encoding="utf-8")
    return 0 if all(finding.holds for finding in run.findings) else 1


if __name__ == "__main__":
    sys.exit(main())
