"""Short questions behind long answers: skip-join MLFQ beside first come first served.

More long answers are wanted than a step has places for, and they need more KV memory than there is.
Then short questions arrive. The same requests are sent under either policy.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.table import Table

from fastserve_mega.client import AsyncClient
from fastserve_mega.launcher import Deployment, LaunchError
from fastserve_mega.launcher.processes import free_port
from fastserve_mega.printing import FittedTable, print_sentence
from fastserve_mega.system.config import Config
from fastserve_mega.system.config_file import load_config
from fastserve_mega.types import SamplingParams

POLICIES = ("skip_join_mlfq", "fcfs")
SCARCE = (
    "scheduler.max_batch_size=2",  # two pipeline stages keep two steps in flight: four places
    "kv_cache.device_blocks=49",  # 768 tokens: enough for four long answers, not for six
    "model.max_context=768",
)
LONG_TOKENS, SHORT_TOKENS = 128, 16
LONG = (
    "Write a long story about a lighthouse keeper who finds a map.",
    "Write a long story about a fox who learns to sail.",
    "Write a long story about a clock that runs backwards.",
    "Write a long story about two sisters and a mountain.",
    "Write a long story about the last train to the sea.",
    "Write a long story about a baker who cannot sleep.",
)
SHORT = (
    "How many days are in a week?",
    "Why is the sky blue?",
    "What is a bicycle?",
    "What does a doctor do?",
    "What is bread made of?",
    "Where do penguins live?",
    "What do cats eat?",
    "What do bees make?",
)
ASK_AFTER_TOKENS = 16
"""Tokens of the first long answer: then the short questions are sent."""
MIN_TEXT_WIDTH = 10


@dataclass
class Job:
    """One request of the burst and what was seen of it."""

    name: str
    question: str
    max_tokens: int
    ttft_s: float | None = None
    jct_s: float | None = None
    text: str = ""
    tokens: int = 0
    under_way: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, client: AsyncClient) -> None:
        params = SamplingParams(max_tokens=self.max_tokens, temperature=0.0)
        sent = time.monotonic()
        answer = await client.chat([{"role": "user", "content": self.question}], params)
        async for chunk in answer:
            if self.ttft_s is None:
                self.ttft_s = time.monotonic() - sent
            self.text += chunk.text
            self.tokens += len(chunk.token_ids)
            if self.tokens >= ASK_AFTER_TOKENS:
                self.under_way.set()
        self.under_way.set()
        self.jct_s = time.monotonic() - sent


@dataclass(frozen=True)
class Outcome:
    """What came of the requests under one policy."""

    long: Sequence[Job]
    short: Sequence[Job]
    swapped_out_blocks: int
    swapped_in_blocks: int

    @property
    def short_jct_s(self) -> float:
        return mean(job.jct_s for job in self.short)

    @property
    def long_jct_s(self) -> float:
        return mean(job.jct_s for job in self.long)


def mean(values: Iterable[float | None]) -> float:
    return statistics.fmean(value or 0.0 for value in values)


def table(policy: str, jobs: Sequence[Job], width: int) -> Table:
    """Each request and the end of its text, in one line."""
    names = max(len(job.name) for job in jobs)
    columns = (("request", names), ("first s", 7), ("done s", 7))
    room = width - sum(size + 3 for _, size in columns) - 4
    view = Table(title=f"scheduler.policy: {policy}", title_justify="left")
    for heading, size in columns:
        view.add_column(heading, justify="right", width=size, no_wrap=True)
    view.add_column("text as it streams", width=max(room, MIN_TEXT_WIDTH), no_wrap=True)
    for job in jobs:
        text = " ".join(job.text.split())
        shown = text if job.jct_s is not None else text[-room:]
        view.add_row(job.name, seconds(job.ttft_s), seconds(job.jct_s), shown)
    return view


def seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


async def burst(endpoint: str, policy: str, console: Console) -> Outcome:
    long = [Job(f"long {i}", text, LONG_TOKENS) for i, text in enumerate(LONG, 1)]
    short = [Job(f"short {i}", text, SHORT_TOKENS) for i, text in enumerate(SHORT, 1)]
    jobs = [*long, *short]
    async with AsyncClient(endpoint) as client:
        await client.tokenizer()  # loading it is not part of anybody's waiting time
        with Live(table(policy, jobs, console.width), console=console) as live:
            running = [asyncio.create_task(job.run(client)) for job in long]
            while not long[0].under_way.is_set():
                await asyncio.wait(running, timeout=0.1)
                live.update(table(policy, jobs, console.width))
            running += [asyncio.create_task(job.run(client)) for job in short]
            while (await asyncio.wait(running, timeout=0.1))[1]:
                live.update(table(policy, jobs, console.width))
            live.update(table(policy, jobs, console.width))
        if not console.is_terminal:
            console.print()  # Live ends its only picture without one
        await asyncio.gather(*running)
        replicas = (await client.snapshot()).replicas
    return Outcome(
        long,
        short,
        sum(replica.swapped_out_blocks for replica in replicas),
        sum(replica.swapped_in_blocks for replica in replicas),
    )


def run_policy(path: str, given: Sequence[str], policy: str, console: Console) -> Outcome:
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    overrides = [
        *given,
        *SCARCE,
        f"scheduler.policy={policy}",
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


def summary(outcomes: Sequence[Outcome]) -> FittedTable:
    """The policies side by side."""
    long, short = len(outcomes[0].long), len(outcomes[0].short)
    rows: dict[str, Callable[[Outcome], str]] = {
        f"{short} short answers, first token": lambda each: seconds(
            mean(job.ttft_s for job in each.short)
        ),
        f"{short} short answers, finished": lambda each: seconds(each.short_jct_s),
        "the last short answer": lambda each: seconds(max(job.jct_s or 0.0 for job in each.short)),
        f"{long} long answers, first token": lambda each: seconds(
            mean(job.ttft_s for job in each.long)
        ),
        f"{long} long answers, finished": lambda each: seconds(each.long_jct_s),
        "the last long answer": lambda each: seconds(max(job.jct_s or 0.0 for job in each.long)),
        "KV blocks moved to host memory": lambda each: str(each.swapped_out_blocks),
        "KV blocks moved back": lambda each: str(each.swapped_in_blocks),
    }
    view = FittedTable("seconds since sent, mean", *POLICIES)
    for name, figure in rows.items():
        view.add_row(name, *map(figure, outcomes))
    return view


def verdict(outcomes: Sequence[Outcome]) -> tuple[str, str]:
    """What was gained, and its price."""
    mlfq, fcfs = outcomes
    return (
        f"Short answers finish {fcfs.short_jct_s / mlfq.short_jct_s:.1f} times sooner under "
        f"{POLICIES[0]} than under {POLICIES[1]}: after {mlfq.short_jct_s:.1f} s instead of "
        f"{fcfs.short_jct_s:.1f} s.",
        f"The price: long ones finish after {mlfq.long_jct_s:.1f} s instead of "
        f"{fcfs.long_jct_s:.1f} s.",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args()
    console = Console(highlight=False)
    try:
        outcomes = [
            run_policy(options.config, options.overrides, policy, console) for policy in POLICIES
        ]
    except (LaunchError, ValueError) as error:
        console.print(f"demo: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    console.print(summary(outcomes))
    for sentence in verdict(outcomes):
        print_sentence(console, sentence)
    return 0


if __name__ == "__main__":
    sys.exit(main())
