"""What one scheduling step costs, at different lengths of the queue.

    python tools/bench_scheduler.py

A step is `Scheduler.step` with the result of the step before, at a full batch, while requests
finish and arrive so that the queue keeps its length. Times are CPU time of this process, so that
they mean something on a machine that does other things as well.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
import tracemalloc
from dataclasses import dataclass
from typing import get_args

from rich.console import Console

from fastserve_mega.plan import Plan
from fastserve_mega.printing import FittedTable
from fastserve_mega.scheduling.cost_model import (
    DecodePoint,
    PrefillPoint,
    Profile,
    ProfiledCostModel,
)
from fastserve_mega.scheduling.events import Arrived, CopyDone, Event, StepDone
from fastserve_mega.scheduling.kv.pool import PoolSizes
from fastserve_mega.scheduling.scheduler import Scheduler
from fastserve_mega.system.config import (
    MlfqConfig,
    PolicyName,
    SchedulerConfig,
    SwapConfig,
    SwapStrategy,
)
from fastserve_mega.types import RequestId

STEP_S = 0.03
"""Time of a decode step in the benchmark's own clock."""
PROFILE = Profile(
    prefill=(PrefillPoint(1, STEP_S), PrefillPoint(2048, 0.4)),
    decode=(DecodePoint(1, 1, STEP_S), DecodePoint(256, 1, 1.5 * STEP_S)),
)
POLICIES = tuple(name for name in get_args(PolicyName) if name != "srpt")
PROMPT_TOKENS = (16, 400)
OUTPUT_TOKENS = (8, 600)
WARM_UP_STEPS = 100
ARRIVALS_PER_S = 50.0


@dataclass(frozen=True)
class Result:
    """Times of the measured steps, microseconds."""

    median_us: float
    p99_us: float
    mean_batch: float
    swapped_blocks: int
    bytes_per_request: float


class Bench:
    """A scheduler with a queue of constant length."""

    def __init__(
        self,
        policy: PolicyName,
        strategy: SwapStrategy,
        *,
        queued: int,
        clients: int,
        batch: int,
        blocks: int,
    ) -> None:
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        self.scheduler = Scheduler(
            SchedulerConfig(
                policy=policy,
                max_batch_size=batch,
                max_batch_tokens=8 * batch,
                mlfq=MlfqConfig(starvation_limit_s=10.0),
            ),
            ProfiledCostModel(PROFILE),
            PoolSizes(blocks, 4 * blocks, 16),
            swap=SwapConfig(strategy=strategy),
        )
        self._clients = clients
        self._count = 0
        self._left: dict[RequestId, int] = {}
        self._now = 0.0
        self._plan = self.scheduler.step(self._now, [self._arrival()])
        for _ in range(queued - 1):  # while the first step is in flight: no burst
            self._now += 1 / ARRIVALS_PER_S
            self.scheduler.step(self._now, [self._arrival()])
        self.bytes_per_request = (tracemalloc.get_traced_memory()[0] - before) / queued
        tracemalloc.stop()

    def step(self) -> float:
        """One step; returns its microseconds."""
        events = self._results()
        begin_ns = time.thread_time_ns()
        self._plan = self.scheduler.step(self._now, events)
        return (time.thread_time_ns() - begin_ns) / 1e3

    @property
    def plan(self) -> Plan | None:
        return self._plan

    def _results(self) -> list[Event]:
        self._now += STEP_S
        if self._plan is None:
            return []
        finished = []
        for piece in self._plan.batch:
            if piece.samples:
                self._left[piece.request_id] -= 1
                if not self._left[piece.request_id]:
                    del self._left[piece.request_id]
                    finished.append(piece.request_id)
        events: list[Event] = [CopyDone(copy.copy_id) for copy in self._plan.copies]
        if self._plan.batch:
            events.append(StepDone(self._plan.step_id, STEP_S, tuple(finished)))
        return events + [self._arrival() for _ in finished]

    def _arrival(self) -> Arrived:
        self._count += 1
        name = RequestId(f"request-{self._count}")
        self._left[name] = _spread(self._count, 7919, OUTPUT_TOKENS)
        prompt = _spread(self._count, 104729, PROMPT_TOKENS)
        client = f"client-{self._count % self._clients}"
        return Arrived(name, prompt, OUTPUT_TOKENS[1], client=client)


def _spread(index: int, prime: int, limits: tuple[int, int]) -> int:
    """Numbers spread evenly over a range, the same in every run."""
    low, high = limits
    return low + index * prime % (high - low)


def measure(bench: Bench, steps: int) -> Result:
    for _ in range(WARM_UP_STEPS):
        bench.step()
    times, batches = [], []
    for _ in range(steps):
        times.append(bench.step())
        batches.append(len(bench.plan.batch) if bench.plan else 0)
    copies = bench.scheduler.memory.copies
    times.sort()
    return Result(
        median_us=statistics.median(times),
        p99_us=times[int(0.99 * len(times))],
        mean_batch=statistics.mean(batches),
        swapped_blocks=copies.swapped_out_blocks + copies.swapped_in_blocks,
        bytes_per_request=bench.bytes_per_request,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queued", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--clients", type=int, nargs="+", default=[1])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=20_000, help="of the device pool")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--strategies", nargs="+", choices=get_args(SwapStrategy),
                        default=["proactive"])  # fmt: skip
    options = parser.parse_args()
    view = FittedTable(
        "policy", "strategy", "clients", "queued", "median µs", "P99 µs", "batch",
        "blocks swapped", "bytes per request", text_columns=2,
        title=f"one step with a batch of {options.batch}",
    )  # fmt: skip
    cases = (options.policies, options.strategies, options.clients, options.queued)
    for policy, strategy, clients, queued in itertools.product(*cases):
        bench = Bench(
            policy,
            strategy,
            queued=queued,
            clients=clients,
            batch=options.batch,
            blocks=options.blocks,
        )
        result = measure(bench, options.steps)
        view.add_row(
            policy, strategy, str(clients), f"{queued:,}", f"{result.median_us:.0f}",
            f"{result.p99_us:.0f}", f"{result.mean_batch:.0f}",
            f"{result.swapped_blocks:,}", f"{result.bytes_per_request:.0f}",
        )  # fmt: skip
    Console().print(view)
    return 0


if __name__ == "__main__":
    sys.exit(main())
