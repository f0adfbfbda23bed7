"""The clients of `overload`: send, cancel, and tell how each request ended."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from fastserve_mega.client import AsyncClient, AsyncGeneration, ClientError, ServerBusyError
from fastserve_mega.types import SamplingParams

from .overload_checks import HUNG, Job, Outcome, Sample, blocks_of, parse_metrics
from .server_processes import resident_bytes

SAMPLE_INTERVAL_S = 10.0
_SETTLING_S = 0.1
_TEMPERATURE = 0.8


@dataclass(frozen=True)
class Capacity:
    """What a server does when there is always more to do."""

    tokens_per_s: float
    """Output tokens."""
    tokens_per_request: float

    @property
    def requests_per_s(self) -> float:
        """Requests that it completes."""
        return self.tokens_per_s / self.tokens_per_request


@asynccontextmanager
async def open_clients(endpoint: str, count: int) -> AsyncIterator[list[AsyncClient]]:
    """Clients that are ready to send."""
    clients = [AsyncClient(endpoint) for _ in range(count)]
    try:
        for client in clients:
            await client.tokenizer()  # its loading must not delay the first request
        yield clients
    finally:
        for client in clients:
            await client.aclose()


async def send(client: AsyncClient, job: Job, begin: float) -> Outcome:
    """Send a request, behave as its client does, and tell how it ended."""
    generation = None
    try:
        params = SamplingParams(max_tokens=job.max_tokens, temperature=_TEMPERATURE, seed=job.seed)
        generation = await client.submit(job.prompt, params, timeout_s=job.timeout_s)
        if job.cancel_after_s is not None:
            await _read_half(generation, job)
            generation.cancel()
        await generation.wait()
        reason = generation.finish_reason.value if generation.finish_reason else "none"
    except ServerBusyError:
        reason = "rejected"
    except ClientError as error:
        reason = f"{type(error).__name__}: {error}"
    except asyncio.CancelledError:
        reason = HUNG
    tokens = len(generation.token_ids) if generation else 0
    return Outcome(reason, tokens, time.monotonic() - begin)


async def _read_half(generation: AsyncGeneration, job: Job) -> None:
    async def read() -> None:
        while 2 * len(generation.token_ids) < job.max_tokens and await generation.take():
            pass

    try:
        await asyncio.wait_for(read(), job.cancel_after_s)
    except TimeoutError:
        return


async def measure_capacity(
    clients: Sequence[AsyncClient], jobs: Iterator[Job], seconds: float, concurrency: int
) -> Capacity:
    """Keep `concurrency` requests at the server for `seconds`, and wait for their ends.

    The tokens are counted over the time without its first quarter, in which the batch fills.

    Raises:
        RuntimeError: a request did not end as it should.
    """
    begin = time.monotonic()
    outcomes: list[Outcome] = []

    async def keep_busy(client: AsyncClient) -> None:
        while time.monotonic() - begin < seconds:
            outcomes.append(await send(client, next(jobs), begin))

    loops = asyncio.gather(*(keep_busy(clients[i % len(clients)]) for i in range(concurrency)))
    counts = []
    for until_s in (seconds / 4, seconds):
        await asyncio.sleep(begin + until_s - time.monotonic())
        metrics = parse_metrics(await clients[0].metrics())
        counts.append((time.monotonic(), metrics["generation_tokens_total"]))
    await loops
    if wrong := {outcome.reason for outcome in outcomes} - {"stop", "length"}:
        raise RuntimeError(
            f"requests ended with {', '.join(sorted(wrong))} while the capacity was measured with "
            f"{concurrency} at a time"
        )
    (first_at, first), (last_at, last) = counts
    mean = sum(outcome.output_tokens for outcome in outcomes) / len(outcomes)
    return Capacity((last - first) / (last_at - first_at), mean)


async def offer(
    clients: Sequence[AsyncClient],
    jobs: Iterator[Job],
    *,
    rate: float,
    seconds: float,
    rng: random.Random,
) -> list[asyncio.Task[Outcome]]:
    """Poisson arrivals, `rate` requests per second; returns without waiting for the answers."""
    begin = time.monotonic()
    tasks: list[asyncio.Task[Outcome]] = []
    at_s = rng.expovariate(rate)
    while at_s < seconds:
        await asyncio.sleep(max(begin + at_s - time.monotonic(), 0.0))
        client = clients[len(tasks) % len(clients)]
        tasks.append(asyncio.create_task(send(client, replace(next(jobs), at_s=at_s), begin)))
        at_s += rng.expovariate(rate)
    return tasks


async def take_sample(client: AsyncClient, begin: float) -> Sample:
    """Look at the pools and at the memory of all processes below this one."""
    metrics = parse_metrics(await client.metrics())
    unfinished = sum(v for name, v in metrics.items() if name.startswith("level_requests"))
    return Sample(
        at_s=time.monotonic() - begin,
        unfinished=int(unfinished),
        resident_bytes=resident_bytes(os.getpid()),
        device=blocks_of(metrics, "device"),
        host=blocks_of(metrics, "host"),
    )


async def settled_sample(client: AsyncClient, begin: float, limit_s: float) -> Sample:
    """Sample when no block is owned any more, or after `limit_s`: copies may be under way."""
    deadline = time.monotonic() + limit_s
    while True:
        sample = await take_sample(client, begin)
        if not sample.device.owned + sample.host.owned or time.monotonic() > deadline:
            return sample
        await asyncio.sleep(_SETTLING_S)
