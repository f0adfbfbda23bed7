#!/usr/bin/env python3
"""Measure an OpenAI-compatible server: latencies and throughput under a given load.

Prompts are random token ids, so that all servers see equal lengths; ignore_eos and max_tokens fix
the lengths of the answers; tokens are counted by the server's usage.

    bench_serving.py --url http://127.0.0.1:8000 --requests 100 --rate 2.1 \
        --mix 0.8:64/16,0.2:512/256 --seed 0 --json result.json
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from math import isnan
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table
from serving_statistics import PERCENTILES, Record, summarize

ERROR_CHARACTERS = 200


@dataclass(frozen=True)
class Job:
    """A request to send."""

    index: int
    prompt: list[int]
    output_tokens: int
    at_s: float
    """When to send it, in seconds since the start of the run."""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="without /v1")
    parser.add_argument("--model", help="default: the first one the server lists")
    parser.add_argument("--requests", type=int, default=100, metavar="N")
    load = parser.add_mutually_exclusive_group(required=True)
    load.add_argument("--rate", type=float, help="requests per second, Poisson arrivals")
    load.add_argument("--burst", action="store_true", help="all at once")
    lengths = parser.add_mutually_exclusive_group()
    lengths.add_argument("--mix", help="SHARE:PROMPT/OUTPUT,… in tokens")
    lengths.add_argument("--lengths", type=Path, help="CSV: prompt_tokens,output_tokens")
    parser.add_argument("--input-len", type=int, default=128, help="without --mix and --lengths")
    parser.add_argument("--output-len", type=int, default=64, help="without --mix and --lengths")
    parser.add_argument("--token-ids", default="1000:30000", metavar="LOW:HIGH",
                        help="range the prompts are drawn from, HIGH excluded")  # fmt: skip
    parser.add_argument("--concurrency", type=int, help="most requests at the server at once")
    parser.add_argument("--warmup", type=int, default=0, metavar="N",
                        help="requests before the run, one after another, not counted")  # fmt: skip
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds without any data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write everything here")
    options = parser.parse_args(argv)
    if options.requests < 1 or (options.rate is not None and options.rate <= 0):
        parser.error("--requests and --rate must be positive")
    if options.concurrency is not None and options.concurrency < 1:
        parser.error("--concurrency must be positive")
    try:
        make_jobs(options, options.seed)
    except (ValueError, LookupError, OSError) as error:
        parser.error(f"cannot make the workload: {error!r}")
    return options


def draw_lengths(options: argparse.Namespace, rng: random.Random) -> list[tuple[int, int]]:
    """Prompt and output length of each request."""
    count = options.requests
    if options.mix is not None:
        shares, pairs = [], []
        for part in options.mix.split(","):
            share, _, lengths = part.partition(":")
            prompt, _, output = lengths.partition("/")
            shares.append(float(share))
            pairs.append((int(prompt), int(output)))
        return rng.choices(pairs, shares, k=count)
    if options.lengths is not None:
        with options.lengths.open(newline="", encoding="utf-8") as file:
            rows = [
                (int(r["prompt_tokens"]), int(r["output_tokens"])) for r in csv.DictReader(file)
            ]
        return rng.choices(rows, k=count)
    return [(options.input_len, options.output_len)] * count


def make_jobs(options: argparse.Namespace, seed: int) -> list[Job]:
    """The whole workload, a function of the options and the seed only."""
    rng = random.Random(seed)
    low, high = (int(bound) for bound in options.token_ids.split(":"))
    jobs, at_s = [], 0.0
    for index, (prompt, output) in enumerate(draw_lengths(options, rng)):
        jobs.append(Job(index, [rng.randrange(low, high) for _ in range(prompt)], output, at_s))
        if options.rate is not None:
            at_s += rng.expovariate(options.rate)
    return jobs


async def send(http: httpx.AsyncClient, model: str, job: Job, start: float) -> Record:
    """Send a request and read its stream to the end."""
    body = {
        "model": model,
        "prompt": job.prompt,
        "max_tokens": job.output_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent = time.perf_counter()
    first = last = output_tokens = None
    error = None
    try:
        async with http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode()}")
            async for line in response.aiter_lines():
                if not line.startswith("data:") or line.endswith("[DONE]"):
                    continue
                event = json.loads(line.removeprefix("data:"))
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                if event["choices"]:
                    last = time.perf_counter()
                    first = first or last
                if event.get("usage"):
                    output_tokens = event["usage"]["completion_tokens"]
        if first is None or last is None or output_tokens is None:
            raise RuntimeError("the stream has no text or no usage")
    except (httpx.HTTPError, RuntimeError, ValueError, LookupError) as problem:
        error = f"{type(problem).__name__}: {problem}"[:ERROR_CHARACTERS]
        return Record(
            job.index, len(job.prompt), job.output_tokens, sent_s=sent - start, error=error
        )
    return Record(
        job.index, len(job.prompt), output_tokens, sent - start, first - sent, last - sent
    )


async def run(
    http: httpx.AsyncClient, model: str, jobs: Sequence[Job], limit: int | None
) -> list[Record]:
    """Send each job at its time, and at most `limit` at once."""
    slots = asyncio.Semaphore(limit) if limit else nullcontext()
    start = time.perf_counter()

    async def one(job: Job) -> Record:
        await asyncio.sleep(max(0.0, job.at_s - (time.perf_counter() - start)))
        async with slots:
            return await send(http, model, job, start)

    return await asyncio.gather(*map(one, jobs))


async def measure(options: argparse.Namespace) -> tuple[str, list[Record]]:
    """Warm up, then run; returns the model's name and the records."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=options.url, timeout=options.timeout, limits=limits
    ) as http:
        model = options.model
        if model is None:
            model = (await http.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
        for job in make_jobs(options, options.seed + 1)[: options.warmup]:
            await send(http, model, job, time.perf_counter())
        return model, await run(http, model, make_jobs(options, options.seed), options.concurrency)


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
        "commit": commit.strip() or None,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu or platform.processor(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "httpx": httpx.__version__,
    }


def cpu_seconds() -> float | None:
    """Time that all processes of the machine have used so far, all cores together."""
    if not (stat := Path("/proc/stat")).exists():
        return None
    user, nice, system, _, _, *interrupts = map(int, stat.read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def show(summary: dict[str, Any], console: Console) -> None:
    """Print the summary for people."""
    console.print(f"{summary['completed']} of {summary['requests']} requests completed")
    for error, count in summary["errors"].items():
        console.print(f"[red]{count} x {error}[/red]", highlight=False)
    if not summary["completed"]:
        return
    console.print(
        f"{summary['duration_s']:.1f} s, {summary['requests_per_s']:.2f} requests/s, "
        f"{summary['output_tokens_per_s']:.1f} output tokens/s"
    )
    table = Table("requests", "seconds", "mean", *(f"P{p}" for p in PERCENTILES))
    for group, latencies in summary["latency"].items():
        for name, values in latencies.items():
            label = name.removesuffix("_s").replace("_", " ")
            label = label.upper() if len(label) == 4 or label == "jct" else label
            table.add_row(group, label, *(f"{value:.4f}" for value in values.values()))
        table.add_section()
    worst = summary["slowest_long"]
    group = f"slowest {worst['requests']} of long"
    table.add_row(group, "JCT", f"{worst['jct_s']:.4f}")
    table.add_row(group, "normalized latency", f"{worst['normalized_latency_s']:.4f}")
    console.print(table)


def _plain(record: Record) -> dict[str, Any]:
    """A record for JSON, which knows no NaN."""
    return {k: None if isinstance(v, float) and isnan(v) else v for k, v in asdict(record).items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit status 1 when no request succeeded."""
    options = parse_arguments(argv)
    busy_before, start = cpu_seconds(), time.perf_counter()
    try:
        model, records = asyncio.run(measure(options))
    except httpx.HTTPError as error:
        print(f"{options.url} does not answer: {error}", file=sys.stderr)
        return 1
    summary = summarize(records)
    if (busy_after := cpu_seconds()) is not None and busy_before is not None:
        cores = (busy_after - busy_before) / (time.perf_counter() - start)
        summary["machine_busy_cores"] = cores
    show(summary, Console())
    if options.json is not None:
        config = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
        result = {
            "config": {**config, "model": model},
            "environment": environment(),
            "summary": summary,
            "records": [_plain(record) for record in records],
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if summary["completed"] else 1


if __name__ == "__main__":
    sys.exit(main())
