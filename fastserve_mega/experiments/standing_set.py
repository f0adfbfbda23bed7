"""The workloads that every scheduling policy has to be measured by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from fastserve_mega.experiments import generators
from fastserve_mega.experiments.generators import Generator, OfLengths
from fastserve_mega.experiments.systems import load_system
from fastserve_mega.simulator.config import SimulationConfig
from fastserve_mega.simulator.lengths import Lognormal
from fastserve_mega.simulator.main import simulate, with_policy
from fastserve_mega.simulator.workload import RequestSpec, draw_requests, load_lengths

_CONTEXT_131K = "model.max_context=131072"


@dataclass(frozen=True, slots=True, kw_only=True)
class StandingWorkload:
    """Requests of one kind for one system, at any rate."""

    name: str
    about: str
    """For the title of its table."""
    system: str = "opt-13b-a100"
    """A shipped deployment."""
    overrides: tuple[str, ...] = ()
    source: str | Generator
    """A shipped workload, or what makes the requests."""
    requests: int = 1500
    """Measured in a run."""
    quick_requests: int
    """Measured in a run of a quick comparison."""
    hint_error: float | None = None
    """Clients say how long their answers will be, wrong by a factor whose logarithm has this
    standard deviation; None: they do not say."""

    def load(self) -> SimulationConfig:
        """Return the system with its settings."""
        shipped = self.source if isinstance(self.source, str) else "synthetic"
        return load_system(self.system, shipped, self.overrides)

    def under(self, policy: str, *, warmup: int = 0, cooldown: int = 0) -> SimulationConfig:
        """Return the system under a policy; so many first and last requests are not measured."""
        config = self.load()
        phases = replace(config.workload, warmup_requests=warmup, cooldown_requests=cooldown)
        return with_policy(replace(config, workload=phases), policy)

    def draw(self, seed: int, count: int, data: Path | None = None) -> list[RequestSpec]:
        """Return requests that arrive once a second on average; the same for the same seed.

        Args:
            seed: draws lengths and times; of a trace, says which part of it.
            count: how many.
            data: directory of length files of the user's own.
        """
        requests = self._draw(seed, count, data)
        if self.hint_error is None:
            return requests
        return generators.with_hints(requests, self.hint_error, np.random.default_rng(seed))

    def _draw(self, seed: int, count: int, data: Path | None) -> list[RequestSpec]:
        if not isinstance(self.source, str):
            return self.source(np.random.default_rng(seed), count)
        workload = replace(
            self.load().workload, speedup=1.0, warmup_requests=0, num_requests=count,
            cooldown_requests=0, seed=seed,
        )  # fmt: skip
        if not self._is_trace:
            workload = replace(workload, rate=1.0)
            return draw_requests(workload, load_lengths(workload, data))
        table = load_lengths(workload, data)
        number = np.arange(len(table.lengths))
        part = seed % max(len(number) // count, 1)
        kept = table.where((number >= part * count) & (number < (part + 1) * count))
        requests = draw_requests(workload, kept)
        return at_rate(requests, requests[-1].arrival_s / len(requests))

    @property
    def _is_trace(self) -> bool:
        return self.load().workload.rate is None

    def saturation_rate(self, count: int, data: Path | None = None) -> float:
        """Return how many requests per second fcfs completes when there is always more to do.

        Twice `count` arrive at once; what counts is the time in which the middle half of them
        finish, so neither the filling of the first batch does, nor what runs alone at the end.
        """
        requests = [each._replace(arrival_s=0.0) for each in self.draw(0, 2 * count, data)]
        result = simulate(self.under("fcfs"), requests)
        finished = sorted(record.finish_s for record in result.records)
        quarter = len(finished) // 4
        return 2 * quarter / (finished[3 * quarter] - finished[quarter])


STANDING_SET = (
    StandingWorkload(
        name="sharegpt", about="first turns of ShareGPT", source="paper-sharegpt",
        requests=2000, quick_requests=400,
    ),
    StandingWorkload(
        name="sharegpt-hints", about="the same; clients guess lengths of answers (error 0.5)",
        source="paper-sharegpt", requests=2000, quick_requests=400, hint_error=0.5,
    ),
    StandingWorkload(
        name="alpaca", about="instructions like Alpaca's", source="paper-alpaca",
        requests=2000, quick_requests=800,
    ),
    StandingWorkload(
        name="arxiv", about="summaries of papers, 2,600 in", system="llama-3-8b-h200",
        source="arxiv", quick_requests=500,
    ),
    StandingWorkload(
        name="azure-conv", about="Azure's conversation trace, its own arrivals",
        system="llama-3-8b-h200", source="azure-conv-2023", requests=4000, quick_requests=1200,
    ),
    StandingWorkload(
        name="long-prompts", about="12,000 in, 340 out", system="llama-3-8b-h200",
        overrides=(_CONTEXT_131K, "scheduler.max_batch_tokens=2048"),
        source=generators.long_prompts, requests=600, quick_requests=300,
    ),
    StandingWorkload(
        name="long-prompts-a100", about="the same, a device pool for 13 such requests",
        system="llama-3-8b-a100", overrides=(_CONTEXT_131K,),
        source=generators.long_prompts, requests=600, quick_requests=300,
    ),
    StandingWorkload(
        name="prompt-bursts", about="bursts of 256 prompts of 2,000, 28 out",
        system="llama-3-8b-h200", source=generators.prompt_bursts,
        requests=5120, quick_requests=1024,
    ),
    StandingWorkload(
        name="bimodal", about="nine answers of 40 tokens to one of 1,000",
        source=generators.bimodal, requests=2000, quick_requests=800,
    ),
    StandingWorkload(
        name="flood", about="19 short requests of one client to a long one of another",
        source=generators.flood, requests=3000, quick_requests=1000,
    ),
    StandingWorkload(
        name="burst-flood", about="one client's conversations beside bursts of 256 of another's",
        source=generators.burst_flood, quick_requests=800,
    ),
    StandingWorkload(
        name="one-long-answer", about="one answer of 32,768 tokens beside short ones",
        system="llama-3-8b-h200", overrides=(_CONTEXT_131K, "scheduler.max_batch_size=16"),
        source=generators.one_long_answer, requests=2000, quick_requests=600,
    ),
    StandingWorkload(
        name="tiny-pool", about="a device pool little above one request",
        overrides=("kv_cache.device_blocks=140",), source=generators.conversations,
        requests=500, quick_requests=200,
    ),
    StandingWorkload(
        name="tiny-pool-no-host", about="the same without a host pool",
        overrides=("kv_cache.device_blocks=140", "kv_cache.host_blocks=0"),
        source=generators.conversations, requests=500, quick_requests=200,
    ),
    StandingWorkload(
        name="small-host", about="a small device pool, room for one request in the host's",
        overrides=("kv_cache.device_blocks=300", "kv_cache.host_blocks=140"),
        source=generators.conversations, requests=500, quick_requests=250,
    ),
    StandingWorkload(
        name="priorities", about="one request in four urgent, three in the background",
        source=generators.priorities, quick_requests=400,
    ),
    StandingWorkload(
        name="batch-1", about="one request a step", overrides=("scheduler.max_batch_size=1",),
        source=generators.conversations, requests=300, quick_requests=100,
    ),
    StandingWorkload(
        name="batch-256", about="256 requests a step", system="llama-3-8b-h200",
        overrides=("scheduler.max_batch_size=256",), source=generators.conversations,
        requests=3000, quick_requests=1500,
    ),
    StandingWorkload(
        name="batch-is-tokens", about="as many tokens a step as requests, 64",
        system="llama-3-8b-h200",
        overrides=("scheduler.max_batch_size=64", "scheduler.max_batch_tokens=64"),
        source=generators.conversations, quick_requests=800,
    ),
    # These came after the policies were made: nothing was chosen with them in view.
    StandingWorkload(
        name="agents", about="3,000 in, 60 out", system="llama-3-8b-h200",
        overrides=(_CONTEXT_131K,), quick_requests=500,
        source=OfLengths(Lognormal(mean=3000, cv=0.8), Lognormal(mean=60, cv=1.2)),
    ),
    StandingWorkload(
        name="reasoning", about="300 in, 1,500 out with a long tail", system="llama-3-8b-h200",
        overrides=(_CONTEXT_131K,), quick_requests=500,
        source=OfLengths(Lognormal(mean=300, cv=1.0), Lognormal(mean=1500, cv=1.5)),
    ),
    StandingWorkload(
        name="bursty-chat", about="137 in, 470 out, in bursts (cv 3)", quick_requests=400,
        source=OfLengths(
            Lognormal(mean=137, cv=1.2), Lognormal(mean=470, cv=0.6), longest=1000, burstiness=3.0
        ),
    ),
    StandingWorkload(
        name="rag-and-chat", about="three documents of 8,000 tokens to seven chats",
        system="llama-3-8b-a100", overrides=(_CONTEXT_131K,),
        source=generators.rag_and_chat, requests=1000, quick_requests=400,
    ),
    StandingWorkload(
        name="code", about="1,500 in, 12 out", system="llama-3-8b-h200",
        source=OfLengths(Lognormal(mean=1500, cv=0.5), Lognormal(mean=12, cv=0.8)),
        quick_requests=1000,
    ),
    StandingWorkload(
        name="chats-small-pool", about="400 in, 400 out, pools for a few of them",
        overrides=("kv_cache.device_blocks=400", "kv_cache.host_blocks=250"),
        source=OfLengths(
            Lognormal(mean=400, cv=0.7), Lognormal(mean=400, cv=0.7), longest=1000
        ),
        requests=500, quick_requests=300,
    ),
)  # fmt: skip


def find_workload(name: str) -> StandingWorkload:
    """Return the workload of a name.

    Raises:
        ValueError: there is none; the message names all.
    """
    for workload in STANDING_SET:
        if workload.name == name:
            return workload
    known = ", ".join(workload.name for workload in STANDING_SET)
    raise ValueError(f"there is no workload {name!r}; there are {known}")


def at_rate(requests: Sequence[RequestSpec], rate: float) -> list[RequestSpec]:
    """Return requests that arrive once a second at another rate, in requests per second."""
    return [each._replace(arrival_s=each.arrival_s / rate) for each in requests]
