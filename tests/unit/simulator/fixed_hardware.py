"""A cost model with round figures, and helpers to run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastserve_mega.scheduling.kv.pool import PoolSizes
from fastserve_mega.scheduling.scheduler import Scheduler
from fastserve_mega.simulator.engine_model import StepWork
from fastserve_mega.simulator.records import SimulationResult
from fastserve_mega.simulator.replica import SimulatedReplica
from fastserve_mega.simulator.simulation import Simulation
from fastserve_mega.simulator.workload import RequestSpec
from fastserve_mega.system.config import MlfqConfig, SchedulerConfig


@dataclass
class RoundCosts:
    """Stages of fixed times, plus `token_s` on the first one per token beyond one per slice."""

    stages: tuple[float, ...] = (1.0,)
    token_s: float = 0.0
    hop_s: float = 0.0
    step_overhead_s: float = 0.0
    block_copy_s: float = 1.0
    works: list[StepWork] = field(default_factory=list)

    def stage_times(self, work: StepWork) -> list[float]:
        self.works.append(work)
        first = self.stages[0] + self.token_s * (work.tokens - work.decode_slices)
        return [first, *self.stages[1:]]

    def hop_times(self, tokens: int) -> list[float]:
        return [self.hop_s] * (len(self.stages) - 1) + [0.0]

    def copy_s(self, blocks: int, block_size: int) -> float:
        return blocks * self.block_copy_s

    def prefill_s(self, tokens: int) -> float:
        return sum(self.stages) + self.token_s * tokens

    def decode_s(self, batch: int, context: int) -> float:
        return sum(self.stages)

    def observe(self, prefill_tokens: int, decodes: int, context: int, elapsed_s: float) -> None:
        pass


def run(costs: Any, requests: Sequence[tuple[Any, ...]], **options: Any) -> SimulationResult:
    """Simulate (arrival, prompt, output) requests; options are the scheduler's or the run's."""
    run_options = {
        name: options.pop(name)
        for name in (
            "oracle",
            "max_context",
            "warmup",
            "cooldown",
            "timeline_interval_s",
            "on_finished",
            "slo",
            "make_placer",
            "outages",
        )
        if name in options
    }  # fmt: skip
    blocks = options.pop("device_blocks", 100)
    num_replicas = options.pop("replicas", 1)
    max_queued = options.pop("max_queued_requests", 1000)
    mlfq = MlfqConfig(starvation_limit_s=None)
    config = SchedulerConfig(**{"policy": "fcfs", "mlfq": mlfq, "admission": "greedy", **options})
    stages = len(costs.stages)
    pools = PoolSizes(blocks, 0, 16)
    replicas = [
        SimulatedReplica(
            Scheduler(config, costs, pools, window=stages), costs, stages=stages, block_size=16
        )
        for _ in range(num_replicas)
    ]
    return Simulation(
        replicas,
        [RequestSpec(*request) for request in requests],
        max_queued_requests=max_queued,
        **run_options,
    ).run()
