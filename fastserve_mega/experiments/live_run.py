"""A run of the live engine: requests sent at their times, as their client saw them."""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastserve_mega import launcher
from fastserve_mega.client import AsyncClient
from fastserve_mega.coordinator.event_log import SchedulerSetup, StepCall, read_event_log
from fastserve_mega.launcher.processes import free_port
from fastserve_mega.simulator.records import RequestRecord
from fastserve_mega.simulator.workload import RequestSpec
from fastserve_mega.slo import Slo, largest_gap, lateness
from fastserve_mega.system.config_file import load_config
from fastserve_mega.system.key_file import client_address
from fastserve_mega.types import SamplingParams

_CALIBRATION_REQUESTS = 4
_CALIBRATION_TOKENS = 32
_PING_EVERY_S = 0.005


@dataclass(frozen=True)
class ClientRun:
    """What the clients saw; seconds on the clock of the run, which begins with it."""

    records: list[RequestRecord]
    delivery_s: float
    """Time to the coordinator and back, measured before the first request: see `_delivery_s`."""
    copy_block_s: float
    """Time to copy a KV block."""


@dataclass(frozen=True)
class LiveRun:
    """What the clients saw, and what the coordinator recorded."""

    clients: ClientRun
    setup: SchedulerSetup
    calls: list[StepCall]


def run_live(config_path: str, sets: Sequence[str], specs: Sequence[RequestSpec]) -> LiveRun:
    """Start a deployment, send the requests at their times, and read its event log."""
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "events.jsonl"
        endpoint = f"tcp://127.0.0.1:{free_port()}"
        more = (f"coordinator.client_endpoint={endpoint}", f"coordinator.event_log={log}")
        sets = [*sets, *more]
        config = load_config(config_path, sets)
        with launcher.Deployment(config, arguments_of(config_path, sets), http=False) as ranks:
            ranks.start()
            clients = asyncio.run(send_all(client_address(config.coordinator), specs))
        setup, calls = read_event_log(log)
        return LiveRun(clients, setup, list(calls))


def arguments_of(config_path: str, sets: Sequence[str]) -> list[str]:
    return ["--config", config_path, *(word for value in sets for word in ("--set", value))]


async def send_all(endpoint: str, specs: Sequence[RequestSpec]) -> ClientRun:
    """Send all requests, each at its time."""
    numbers = random.Random(0)
    async with AsyncClient(endpoint) as client:
        vocab_size = (await client.info()).vocab_size
        await client.tokenizer()  # its loading must not delay the first request
        prompts = [
            [numbers.randrange(vocab_size) for _ in range(spec.prompt_tokens)] for spec in specs
        ]
        delivery_s = await _delivery_s(client)
        begin = time.monotonic()
        records = await asyncio.gather(
            *(
                _send(client, prompt, spec, begin)
                for prompt, spec in zip(prompts, specs, strict=True)
            )
        )
        return ClientRun(list(records), delivery_s, _copy_block_s(await client.metrics()))


async def _delivery_s(client: AsyncClient) -> float:
    """Measure the mean time of a ping while tokens stream to the client, as in the run."""
    params = SamplingParams(max_tokens=_CALIBRATION_TOKENS, temperature=0.0, ignore_eos=True)
    answers = [await client.submit([1], params) for _ in range(_CALIBRATION_REQUESTS)]
    streams = asyncio.gather(*(answer.wait() for answer in answers))
    times = []
    while not streams.done():
        begin = time.monotonic()
        await client.ping()
        times.append(time.monotonic() - begin)
        await asyncio.sleep(_PING_EVERY_S)
    await streams
    return sum(times) / len(times)


async def _send(
    client: AsyncClient, prompt: Sequence[int], spec: RequestSpec, begin: float
) -> RequestRecord:
    params = SamplingParams(max_tokens=spec.output_tokens, temperature=0.0, ignore_eos=True)
    await asyncio.sleep(max(begin + spec.arrival_s - time.monotonic(), 0.0))
    sent_s = time.monotonic() - begin
    answer = await client.submit(prompt, params)
    times = []
    while await answer.take():
        times.append(time.monotonic() - begin)
    if len(answer.token_ids) != spec.output_tokens:
        raise RuntimeError(f"a request ended with {answer.finish_reason}, {answer.usage}")
    return RequestRecord(
        spec.prompt_tokens, spec.output_tokens, sent_s, times[0], times[-1], largest_gap(times),
        lateness(times, sent_s, spec.output_tokens, Slo().tpot_s),
    )  # fmt: skip


def _copy_block_s(metrics: str) -> float:
    values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))

    def both_ways(name: str) -> float:
        labels = ('{direction="in"}', '{direction="out"}')
        return sum(float(values.get(f"fastserve_{name}{label}", 0)) for label in labels)

    blocks = both_ways("swap_blocks_total")
    return both_ways("copy_seconds_sum") / blocks if blocks else 0.0
