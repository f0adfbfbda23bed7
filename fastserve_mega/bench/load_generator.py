"""Sends the requests at their times and notes what came back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

from fastserve_mega.bench.statistics import Record
from fastserve_mega.bench.targets import Target, TargetError
from fastserve_mega.bench.workload import Job
from fastserve_mega.slo import Slo, largest_gap, lateness


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
