"""Compares servers with the OpenAI API under the same loads, one server at a time, in turns.

    python tools/compare_servers.py --servers paced,vllm --rounds 2 --json result.json

A round starts each server, warms it up, sends it every load, and stops it, before the next server
starts. Within a round all servers get the same lengths and arrivals, each load with token ids that
no server has seen; prompts are token ids and answers ignore their end, so that lengths are equal,
and what the server says of them (`usage`) is checked. A run beside which other processes used more
than `--busy` cores is marked, and counts for nothing where there is a quiet one.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from comparison import Run, cpu_seconds_of_others, show
from rich.console import Console

from fastserve_mega.bench.bench import run_jobs
from fastserve_mega.bench.statistics import summarize
from fastserve_mega.bench.tables import environment
from fastserve_mega.bench.targets import HttpTarget, Reply, TargetError
from fastserve_mega.bench.workload import Job, make_jobs, parse_mix
from fastserve_mega.process_tree import descendants, die_with_parent
from fastserve_mega.records import PositiveFloat, PositiveInt, Record
from fastserve_mega.system.config_file import load_yaml

TOKEN_IDS = range(1000, 30000)
WARMUP_TOKENS = 8
STOP_S = 30
SILENCE_S = 300


class Load(Record, frozen=True):
    """Requests to send."""

    requests: PositiveInt
    lengths: str
    """`SHARE:PROMPT/OUTPUT,…`"""
    rate: PositiveFloat | None = None
    """Poisson arrivals per second; None sends all at once."""
    concurrency: PositiveInt | None = None
    """Most requests at the server at once; None sets no limit."""


class Setting(Record, frozen=True):
    """Servers that are comparable, and what is sent to them."""

    servers: dict[str, str]
    """Commands."""
    loads: dict[str, Load]


class Comparison(Record, frozen=True):
    """All that `compare_servers.yaml` says."""

    port: PositiveInt
    ready_s: PositiveFloat
    baseline: str
    parts: dict[str, str]
    settings: dict[str, Setting]

    def command(self, text: str) -> list[str]:
        """The arguments of a command, with all its parts filled in."""
        fragments = {**self.parts, "port": str(self.port)}
        while (filled := text.format_map(fragments)) != text:
            text = filled
        return [os.path.expanduser(word) for word in shlex.split(text)]


class CheckedTarget(HttpTarget):
    """A server whose answers must have the lengths that were asked for."""

    async def send(self, job: Job) -> Reply:
        reply = await super().send(job)
        for name, found, wanted in (
            ("prompt", reply.prompt_tokens, len(job.prompt)),
            ("answer", reply.output_tokens, job.output_tokens),
        ):
            if found != wanted:
                raise TargetError(f"the server counts {found} tokens of a {name} of {wanted}")
        return reply


@contextmanager
def serving(command: Sequence[str], comparison: Comparison, log: Path) -> Iterator[str]:
    """A server's address while it runs; nothing of it is left afterwards.

    Raises:
        TargetError: it ends, or does not answer in time.
    """
    with log.open("wb") as file:
        server = subprocess.Popen(
            command,
            stdout=file,
            stderr=file,
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - one system call, no lock
        )
    url = f"http://127.0.0.1:{comparison.port}"
    try:
        deadline = time.monotonic() + comparison.ready_s
        while not _answers(url):
            if server.poll() is not None or time.monotonic() > deadline:
                raise TargetError(f"{command[0]} does not serve: see {log}")
            time.sleep(0.5)
        yield url
    finally:
        below = descendants(server.pid)
        server.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            server.wait(STOP_S)
        for process in (server.pid, *below):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        server.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


async def measure(url: str, load: Load, seed: int, number: int, scale: float) -> dict[str, Any]:
    """The summary of a load, after a warm-up of as many requests as it has at once."""
    requests = max(1, round(load.requests * scale))
    mix = parse_mix(load.lengths)

    def jobs(count: int, run: int, rate: float | None) -> list[Job]:
        return make_jobs(mix, TOKEN_IDS, count, rate, seed=seed, run=run)

    async with CheckedTarget(url, None, SILENCE_S) as target:
        warmup = jobs(min(load.concurrency or 4, requests), 2 * number, None)
        short = [dataclasses.replace(job, output_tokens=WARMUP_TOKENS) for job in warmup]
        await run_jobs(target, short, load.concurrency)
        records = await run_jobs(
            target, jobs(requests, 2 * number + 1, load.rate), load.concurrency
        )
    return summarize(records)


def run_round(comparison: Comparison, number: int, options: argparse.Namespace) -> Iterator[Run]:
    """Every setting, its servers one after the other."""
    for name, setting in comparison.settings.items():
        if name not in options.settings:
            continue
        servers = [each for each in options.servers if each in setting.servers]
        # In turns, and no server always first.
        for server in servers if number % 2 == 0 else reversed(servers):
            log = options.logs / f"{name}-{server}-{number}.log"
            command = comparison.command(setting.servers[server])
            with serving(command, comparison, log) as url:
                for at, (load_name, load) in enumerate(setting.loads.items()):
                    if options.loads and load_name not in options.loads:
                        continue
                    before, began = cpu_seconds_of_others(), time.monotonic()
                    summary = asyncio.run(
                        measure(url, load, options.seed + number, at, options.scale)
                    )
                    cores = (cpu_seconds_of_others() - before) / (time.monotonic() - began)
                    yield Run(name, load_name, server, number, max(0.0, cores), summary)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def parse_arguments() -> tuple[argparse.Namespace, Comparison]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = Path(__file__).with_suffix(".yaml")
    parser.add_argument("--config", type=Path, default=default, help=f"default: {default.name}")
    parser.add_argument(
        "--set", action="append", default=[], metavar="PART=VALUE", dest="overrides"
    )
    parser.add_argument("--servers", type=_names, default=["paced", "vllm"], help="in this order")
    parser.add_argument("--settings", type=_names, help="default: all")
    parser.add_argument("--loads", type=_names, help="default: all")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of requests")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="default: the time")
    parser.add_argument("--busy", type=float, default=0.05, help="cores of others; default: 0.05")
    parser.add_argument("--logs", type=Path, default=Path("build/compare_servers"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    try:
        comparison = load_yaml(options.config, Comparison, options.overrides)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    options.settings = options.settings or list(comparison.settings)
    options.logs.mkdir(parents=True, exist_ok=True)
    return options, comparison


def main() -> int:
    options, comparison = parse_arguments()
    console, runs = Console(), list[Run]()
    try:
        for number in range(options.rounds):
            for run in run_round(comparison, number, options):
                runs.append(run)
                summary = run.summary
                console.print(
                    f"round {run.round}, {run.setting}, {run.server}, {run.load}: "
                    f"{summary.get('output_tokens_per_s', 0.0):.1f} output tokens/s, "
                    f"others {run.others:.2f} cores {summary['errors'] or ''}",
                    markup=False, soft_wrap=True, highlight=False,
                )  # fmt: skip
    except TargetError as error:
        print(f"compare_servers: {error}", file=sys.stderr)
        return 1
    finally:
        if options.json is not None:
            plain = [dataclasses.asdict(run) for run in runs]
            result = {"environment": environment(), "runs": plain}
            options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        show(runs, comparison.baseline, options.busy, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
