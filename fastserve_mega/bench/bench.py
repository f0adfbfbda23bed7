"""`fastserve-mega bench`: one run for each rate and concurrency."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fastserve_mega.bench.statistics import Record, summarize
from fastserve_mega.bench.tables import (
    cpu_seconds,
    environment,
    plain_record,
    show_comparison,
    show_run,
)
from fastserve_mega.bench.targets import HttpTarget, Target, TargetError, ZmqTarget
from fastserve_mega.bench.workload import Job, Lengths, make_jobs
from fastserve_mega.slo import Slo, largest_gap, lateness

_WARMUP_RUN = -1


async def run_jobs(
    target: Target,
    jobs: Sequence[Job],
    concurrency: int | None,
    on_done: Callable[[], None] = lambda: None,
    slo: Slo | None = None,
) -> list[Record]:
    """Send each job at its time; returns their records, in order.

    Args:
        target: the server.
        jobs: to send.
        concurrency: most requests at the server at once; None sets no limit. A job that waits for
            its turn counts from when it is sent, as for any closed-loop client.
        on_done: called after each.
        slo: by whose pace tokens are late; None takes the default.
    """
    slots = asyncio.Semaphore(concurrency) if concurrency else nullcontext()
    start = time.perf_counter()

    async def one(job: Job) -> Record:
        await asyncio.sleep(max(0.0, job.at_s - (time.perf_counter() - start)))
        async with slots:
            record = await _record(target, job, start, slo or Slo())
        on_done()
        return record

    return await asyncio.gather(*map(one, jobs))


async def _record(target: Target, job: Job, start: float, slo: Slo) -> Record:
    sent = time.perf_counter()
    lengths = (job.index, len(job.prompt))
    try:
        reply = await target.send(job)
    except TargetError as error:
        return Record(*lengths, job.output_tokens, sent_s=sent - start, error=str(error))
    return Record(
        *lengths,
        reply.output_tokens,
        sent_s=sent - start,
        ttft_s=reply.times[0] - sent,
        jct_s=reply.times[-1] - sent,
        largest_gap_s=largest_gap(reply.times),
        lateness_s=lateness(reply.times, sent, reply.output_tokens, slo.tpot_s),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What to measure, and how."""

    url: str | None
    """Address of an OpenAI-compatible server; None for the coordinator at `endpoint`."""
    endpoint: str
    model: str | None
    """None takes the server's."""
    requests: int
    rates: tuple[float | None, ...]
    """Per second, a run each; None sends all at once."""
    concurrencies: tuple[int | None, ...]
    lengths: tuple[Lengths, ...]
    token_ids: range
    warmup: int
    """Requests before the first run, one after another, not counted."""
    timeout_s: float
    seed: int
    slo: Slo
    json_path: Path | None


def run_bench(options: BenchOptions) -> int:
    """Measure, print and write; returns the exit status, 1 when a run had no answer."""
    try:
        model, runs = asyncio.run(_measure_all(options))
    except TargetError as error:
        print(f"fastserve-mega bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fastserve-mega bench: interrupted", file=sys.stderr)
        return 130
    if len(runs) > 1:
        show_comparison(runs, Console())
    if options.json_path is not None:
        result = {
            "config": {**_plain(options), "model": model},
            "environment": environment(),
            "runs": runs,
        }
        options.json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if all(run["summary"]["completed"] for run in runs) else 1


async def _measure_all(options: BenchOptions) -> tuple[str, list[dict[str, Any]]]:
    """The model's name, and the figures of each run."""
    runs = []
    target: Target = (
        HttpTarget(options.url, options.model, options.timeout_s)
        if options.url is not None
        else ZmqTarget(options.endpoint, options.timeout_s)
    )
    async with target:
        if options.warmup:
            warmup = make_jobs(
                options.lengths,
                options.token_ids,
                options.warmup,
                rate=None,
                seed=options.seed,
                run=_WARMUP_RUN,
            )
            await run_jobs(target, warmup, concurrency=1)
        loads = itertools.product(options.rates, options.concurrencies)
        for number, (rate, concurrency) in enumerate(loads):
            runs.append(await _measure(options, target, number, rate, concurrency))
        return target.model, runs


async def _measure(
    options: BenchOptions,
    target: Target,
    number: int,
    rate: float | None,
    concurrency: int | None,
) -> dict[str, Any]:
    jobs = make_jobs(
        options.lengths,
        options.token_ids,
        options.requests,
        rate,
        seed=options.seed,
        run=number,
    )
    name = "all at once" if rate is None else f"{rate:g} requests/s"
    name += f", {concurrency} at most" if concurrency else ""
    busy_before, start = cpu_seconds(), time.perf_counter()
    with _progress() as progress:
        task = progress.add_task(name, total=len(jobs))
        records: Sequence[Record] = await run_jobs(
            target, jobs, concurrency, lambda: progress.advance(task), options.slo
        )
    summary = summarize(records, options.slo)
    if (busy_after := cpu_seconds()) is not None and busy_before is not None:
        cores = (busy_after - busy_before) / (time.perf_counter() - start)
        summary["machine_busy_cores"] = cores
    console = Console()
    if len(options.rates) * len(options.concurrencies) > 1:
        console.rule(name)
    show_run(summary, console)
    return {
        "rate": rate,
        "concurrency": concurrency,
        "summary": summary,
        "records": [plain_record(record) for record in records],
    }


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(
        *columns,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _plain(options: BenchOptions) -> dict[str, Any]:
    """The options for JSON; a long file of lengths is told by its size."""
    plain = asdict(options)
    plain["json_path"] = str(options.json_path)
    plain["token_ids"] = [options.token_ids.start, options.token_ids.stop]
    if len(options.lengths) > 100:
        plain["lengths"] = f"{len(options.lengths)} pairs"
    return plain
