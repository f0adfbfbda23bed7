"""One long request, and short ones while it runs: skip-join MLFQ beside first come first served."""

from __future__ import annotations

import argparse
import asyncio
import socket
import statistics
import sys
import time
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.table import Table

from fastserve_mega.client import AsyncClient
from fastserve_mega.config import Config
from fastserve_mega.config_file import load_config
from fastserve_mega.launcher import Deployment, LaunchError
from fastserve_mega.types import SamplingParams

POLICIES = ("skip_join_mlfq", "fcfs")
BATCH_LIMIT = 1  # per step; two pipeline stages keep two steps in flight
LONG = ("Write a long story about a lighthouse keeper who finds a map.", 192)
SHORT = (
    ("Describe the ocean in one sentence.", 32),
    ("Why is the sky blue?", 32),
    ("How many days are in a week?", 32),
    ("What is a bicycle?", 32),
    ("What does a doctor do?", 32),
    ("What is bread made of?", 32),
)
TEXT_WIDTH = 72


@dataclass
class Job:
    """One request of the burst and what was seen of it."""

    name: str
    question: str
    max_tokens: int
    sent: float = 0.0
    ttft_s: float | None = None
    jct_s: float | None = None
    text: str = ""
    first_token: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, client: AsyncClient) -> None:
        params = SamplingParams(max_tokens=self.max_tokens, temperature=0.0)
        self.sent = time.monotonic()
        answer = await client.chat([{"role": "user", "content": self.question}], params)
        async for chunk in answer:
            if self.ttft_s is None:
                self.ttft_s = time.monotonic() - self.sent
                self.first_token.set()
            self.text += chunk.text
        self.jct_s = time.monotonic() - self.sent


def table(policy: str, jobs: list[Job]) -> Table:
    view = Table(title=f"scheduler.policy: {policy}", title_justify="left")
    for heading in ("request", "TTFT s", "completed s"):
        view.add_column(heading, justify="right")
    view.add_column("streamed text", width=TEXT_WIDTH, no_wrap=True)
    for job in jobs:
        text = " ".join(job.text.split())
        shown = text if job.jct_s is not None else text[-TEXT_WIDTH:]
        view.add_row(job.name, seconds(job.ttft_s), seconds(job.jct_s), shown[:TEXT_WIDTH])
    return view


def seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


async def burst(endpoint: str, policy: str, console: Console) -> list[Job]:
    jobs = [Job("long", *LONG), *(Job(f"short {i}", *job) for i, job in enumerate(SHORT, 1))]
    async with AsyncClient(endpoint) as client:
        await client.tokenizer()  # loading it is not part of anybody's waiting time
        with Live(table(policy, jobs), console=console, refresh_per_second=8) as live:
            running = [asyncio.create_task(jobs[0].run(client))]
            await asyncio.wait_for(jobs[0].first_token.wait(), timeout=60)
            running += [asyncio.create_task(job.run(client)) for job in jobs[1:]]
            while True:
                done, waiting = await asyncio.wait(running, timeout=0.1)
                live.update(table(policy, jobs))
                if not waiting:
                    break
            for task in done:
                task.result()
    return jobs


def run_policy(path: str, given: list[str], policy: str, console: Console) -> list[Job]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    overrides = [
        *given,
        f"scheduler.policy={policy}",
        f"scheduler.max_batch_size={BATCH_LIMIT}",
        f"coordinator.client_endpoint={endpoint}",
    ]
    arguments = ["--config", path]
    for override in overrides:
        arguments += ["--set", override]
    config: Config = load_config(path, overrides)
    console.print(f"starting {config.parallel.world_size} ranks with scheduler.policy={policy} …")
    with Deployment(config, arguments, http=False) as deployment:
        deployment.start()
        return asyncio.run(burst(endpoint, policy, console))


def summary(results: dict[str, list[Job]]) -> Table:
    view = Table(title="mean over the short requests", title_justify="left")
    for heading in ("policy", "TTFT s", "completed s", "long completed s"):
        view.add_column(heading, justify="right")
    for policy, (long, *short) in results.items():
        ttft, jct = mean_ttft(short), statistics.mean(job.jct_s or 0.0 for job in short)
        view.add_row(policy, f"{ttft:.2f}", f"{jct:.2f}", seconds(long.jct_s))
    return view


def mean_ttft(jobs: list[Job]) -> float:
    return statistics.mean(job.ttft_s or 0.0 for job in jobs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args()
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 112
    try:
        results = {
            policy: run_policy(options.config, options.overrides, policy, console)
            for policy in POLICIES
        }
    except (LaunchError, ValueError) as error:
        console.print(f"demo: {error}", style="red")
        return 1
    console.print(summary(results))
    mlfq, fcfs = (mean_ttft(results[policy][1:]) for policy in POLICIES)
    console.print(
        f"The short requests got their first token {fcfs / mlfq:.1f} times sooner under "
        f"{POLICIES[0]} than under {POLICIES[1]}."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
