#!/usr/bin/env python3
"""What a crowd costs the others: silent, slow and stalled connections, a full queue, too much load.

    python -m tests.system.crowd --config configs/smollm2-135m-cpu.yaml

Serves with ranks that compute nothing (20 ms a step), so that all else is the server's. Beside each
crowd four streams run over HTTP and four over ZeroMQ, and tell what they notice.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path

import httpx
import zmq

from fastserve_mega.client import AsyncClient, ServerBusyError
from fastserve_mega.drill.drill import serving
from fastserve_mega.drill.processes import named_processes
from fastserve_mega.drill.rounds import Served
from fastserve_mega.drill.streams import Stream, over_http, over_zeromq
from fastserve_mega.messaging import frames, messages
from fastserve_mega.system.config_file import load_config
from fastserve_mega.types import FinishReason, RequestId, SamplingParams

from .asked import Figure, tell
from .connections import CROWD, IDLE, idle_and_slow, readers

PAGE_BYTES = 4096
HONEST, HONEST_TOKENS = 8, 100
CANCELLED_SHARE = 0.1
LONG_PROMPT = 4000
LOAD_TOKENS = 32
_STEADY_SHARE = 0.8
"""Of a load, in which memory should not grow any more."""
BYTES_OF_A_TOKEN, BYTES_OF_A_REQUEST = 6, 4_000
"""What a queued request may take (docs/reliability.md)."""
_LIMITS = ("max_queued_tokens", "max_queued_requests", "max_wait_s")
_QUIET_S = 5.0
_LONG_NAME = "m" * 2000
_SETTINGS = {
    # All run at once, so that what differs is the connections; and what they do not read is more
    # than the system takes from the server for them.
    "crowds": ("scheduler.max_batch_size=128", f"model.served_name={_LONG_NAME}"),
    "queue": ("scheduler.max_wait_s=null",),
}


def resident_mb(served: Served) -> dict[str, float]:
    """Memory of the two processes that clients reach."""
    numbers = named_processes(served.process_id)
    return {
        name: int(Path(f"/proc/{numbers[name]}/statm").read_text().split()[1]) * PAGE_BYTES / 1e6
        for name in ("api-server", "coordinator")
    }


async def honest(served: Served) -> tuple[float, float]:
    """Run the streams; return the mean time per token and the largest gap, seconds."""
    async with (
        AsyncClient(served.endpoint) as client,
        httpx.AsyncClient(base_url=served.url, timeout=300, trust_env=False) as http,
    ):
        vocab_size = (await client.info()).vocab_size
        streams = [
            Stream(number, "HTTP" if number % 2 else "ZeroMQ", HONEST_TOKENS, vocab_size)
            for number in range(HONEST)
        ]
        await asyncio.gather(
            *(
                over_http(http, each) if each.kind == "HTTP" else over_zeromq(client, each)
                for each in streams
            )
        )
    if errors := [each.error for each in streams if each.error]:
        raise RuntimeError(f"a stream has failed: {errors[0]}")
    gaps = [b - a for each in streams for a, b in itertools.pairwise(each.times)]
    return statistics.mean(gaps), max(gaps)


async def compare(
    served: Served, name: str, crowd: Callable[[], contextlib.AbstractAsyncContextManager[None]]
) -> float:
    """Print what the streams notice beside a crowd; return their mean time per token."""
    before = resident_mb(served)
    async with crowd():
        mean, gap = await honest(served)
        during = resident_mb(served)
    await asyncio.sleep(5)
    after = resident_mb(served)
    memory = ", ".join(f"{k} {before[k]:.0f}, {during[k]:.0f}, {after[k]:.0f} MB" for k in before)
    print(f"{name}: {mean * 1000:.1f} ms a token, largest gap {gap:.2f} s; {memory}", flush=True)
    return mean


async def crowds(served: Served, _: argparse.Namespace) -> list[Figure]:
    """Silent, slow and stalled connections."""
    kinds: dict[str, Callable[[], contextlib.AbstractAsyncContextManager[None]]] = {
        "nobody else": contextlib.nullcontext,
        f"{IDLE} silent, {CROWD} slow": lambda: idle_and_slow(served),
        f"{CROWD} readers": lambda: readers(served, stalled=False),
        f"{CROWD} stalled": lambda: readers(served, stalled=True),
    }
    # In turn, and the best of each: other work on the machine makes times longer, never shorter.
    rounds = [
        [await compare(served, name, crowd) for name, crowd in kinds.items()] for _ in range(3)
    ]
    alone, beside, reading, stalled = map(min, zip(*rounds, strict=True))
    print(
        f"silent and slow: {beside / alone:.3f} of the time per token alone; stalled: "
        f"{stalled / reading:.3f} of that beside readers (asked: at most 1.05)"
    )
    return [
        Figure("time per token beside silent and slow ones, of that alone", beside / alone, 1.05),
        Figure("beside stalled readers, of that beside readers", stalled / reading, 1.05),
    ]


def flood(served: Served, count: int) -> tuple[Counter[str], float]:
    """Send so many requests with long prompts as fast as they are read.

    Returns how they ended until nothing was refused for a while, those that were taken go on, and
    the largest memory of the coordinator, MB.
    """
    context = zmq.Context()
    door = context.socket(zmq.DEALER)
    frames.connect(door, served.endpoint)
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    ends, most = Counter[str](), 0.0

    def take(wait_ms: int) -> bool:
        """Read what is there; whether something was refused."""
        refused = False
        while door.poll(0 if refused else wait_ms):
            message = frames.decode(door.recv())
            if isinstance(message, messages.Finished):
                limits = [each for each in _LIMITS if each in message.message]
                ends[f"refused by {limits[0]}" if limits else message.reason.value] += 1
                refused |= bool(limits)
        return refused

    for number in range(count):
        prompt = (number % 40_000, *range(1, LONG_PROMPT))
        door.send(frames.encode(messages.Submit(RequestId(f"q{number}"), prompt, params)))
        take(0)
        if number % 1000 == 0:
            most = max(most, resident_mb(served)["coordinator"])
    last = time.monotonic()
    while time.monotonic() < last + _QUIET_S:
        if take(100):
            last = time.monotonic()
    most = max(most, resident_mb(served)["coordinator"])
    context.destroy(linger=0)
    return ends, most


async def queue(served: Served, options: argparse.Namespace) -> list[Figure]:
    """So many requests with long prompts; most have to be refused, by their tokens."""
    before, begin = resident_mb(served)["coordinator"], time.monotonic()
    ends, most = await asyncio.to_thread(flood, served, options.queued)
    seconds = time.monotonic() - begin
    async with AsyncClient(served.endpoint) as client:
        generation = await client.submit([1, 2], SamplingParams(max_tokens=4, ignore_eos=True))
        await asyncio.wait_for(generation.wait(), 120)
    print(
        f"{options.queued} requests of {LONG_PROMPT} tokens in {seconds:.0f} s: {dict(ends)}; "
        f"coordinator {before:.0f} MB before, {most:.0f} at most, "
        f"{resident_mb(served)['coordinator']:.0f} after they went away"
    )
    limits = load_config(options.config, options.set).scheduler
    taken = options.queued - sum(ends[f"refused by {each}"] for each in _LIMITS)
    bound = BYTES_OF_A_TOKEN * limits.max_queued_tokens
    bound += BYTES_OF_A_REQUEST * limits.max_queued_requests
    return [
        Figure("requests not refused", taken, 2 * limits.max_queued_tokens / LONG_PROMPT),
        Figure("MB that the coordinator grew by", most - before, bound / 1e6),
    ]


def descriptors(served: Served) -> int:
    """Open files of `serve` and of all processes below it that have a name."""
    processes = (served.process_id, *named_processes(served.process_id).values())
    return sum(len(list(Path(f"/proc/{process}/fd").iterdir())) for process in processes)


def grown(
    early: dict[str, float], late: dict[str, float], share: float, minutes: float
) -> list[Figure]:
    """How the processes grew in these minutes of a load."""
    return [
        Figure(
            f"MB a minute that the {name} grows by at {share}",
            (late[name] - early[name]) / minutes,
            0.5,
        )
        for name in late
    ]


async def one_request(
    client: AsyncClient, numbers: random.Random, firsts: list[float], outcomes: Counter[str]
) -> None:
    """Add when the first token came, and the end, unless it was refused."""
    begin, number = time.monotonic(), numbers.randrange(1, 40_000)
    params = SamplingParams(max_tokens=LOAD_TOKENS, ignore_eos=True, seed=number)
    leaves_after = LOAD_TOKENS // 2 if numbers.random() < CANCELLED_SHARE else None
    try:
        generation = await client.submit([number, *range(1, 32)], params)
        count = 0
        async for chunk in generation:
            if not count:
                firsts.append(time.monotonic() - begin)
            count += len(chunk.token_ids)
            if leaves_after is not None and count >= leaves_after:
                generation.cancel()
                break
        outcomes["cancelled" if leaves_after else FinishReason.LENGTH.value] += 1
    except ServerBusyError:
        outcomes["refused"] += 1


async def load(served: Served, options: argparse.Namespace) -> list[Figure]:
    """Poisson arrivals below and above the capacity, a tenth cancelled: when first tokens come."""
    numbers = random.Random(0)
    async with AsyncClient(served.endpoint) as client:
        files = descriptors(served)
        begin, done = time.monotonic(), Counter[str]()
        await asyncio.gather(*(one_request(client, numbers, [], done) for _ in range(200)))
        rate = sum(done.values()) / (time.monotonic() - begin)
        p95 = {}
        growth: list[Figure] = []
        overload_minutes = options.overload_minutes or options.minutes / 2
        for share, minutes in ((0.8, options.minutes), (3.0, overload_minutes)):
            early: dict[str, float] = {}
            firsts: list[float] = []
            outcomes: Counter[str] = Counter()
            tasks, end = [], time.monotonic() + 60 * minutes
            while time.monotonic() < end:
                await asyncio.sleep(numbers.expovariate(rate * share))
                tasks.append(asyncio.create_task(one_request(client, numbers, firsts, outcomes)))
                if not early and end - time.monotonic() < 60 * minutes * _STEADY_SHARE:
                    early = resident_mb(served)
            growth += grown(early, resident_mb(served), share, minutes * _STEADY_SHARE)
            await asyncio.gather(*tasks)
            p95[share] = statistics.quantiles(firsts, n=20)[-1]
            print(
                f"load {share}: {len(tasks)} requests, {dict(outcomes)}; TTFT of those taken: "
                f"median {statistics.median(firsts):.3f} s, P95 {p95[share]:.3f} s; "
                f"memory {resident_mb(served)}",
                flush=True,
            )
        (replica,) = (await client.snapshot()).replicas
    return [
        Figure("P95 of the first token at 3 times the capacity, of that at 0.8",
               p95[3.0] / p95[0.8], 2),
        *growth,
        Figure("descriptors more than before", descriptors(served) - files, 0),
        Figure("requests left in the queue", len(replica.requests), 0),
        Figure("KV blocks still owned", replica.device.owned + replica.host.owned, 0),
    ]  # fmt: skip


PARTS: dict[str, Callable[[Served, argparse.Namespace], Coroutine[None, None, list[Figure]]]] = {
    "crowds": crowds, "queue": queue, "load": load,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--queued", type=int, default=100_000, help="requests of `queue`")
    parser.add_argument("--minutes", type=float, default=2, help="of `load` below the capacity")
    parser.add_argument("--overload-minutes", type=float, help="above it; half of those without")
    options = parser.parse_args()
    figures: list[Figure] = []
    for part in options.parts:
        sets = [*_SETTINGS.get(part, ()), *options.set]
        words = [word for value in sets for word in ("--set", value)]
        config = load_config(options.config, sets)
        with serving(config, ["--config", options.config, *words], "fake") as served:
            figures += asyncio.run(PARTS[part](served, options))
    return 0 if tell(figures) else 1


if __name__ == "__main__":
    sys.exit(main())
