"""One copy of the model in a simulation: a live scheduler, and ranks that are numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastserve_mega.plan import Plan
from fastserve_mega.scheduling.events import CopyDone
from fastserve_mega.scheduling.scheduler import Scheduler
from fastserve_mega.simulator.engine_model import EngineModel, step_work
from fastserve_mega.simulator.pipeline import Pipeline, SimulatedCopies


@dataclass(frozen=True, slots=True)
class SimulatedStep:
    """A plan that the simulated ranks execute."""

    plan: Plan
    dispatched_s: float


@dataclass(frozen=True, slots=True)
class Outage:
    """A time without a replica: its ranks and their KV are lost, and what it had goes elsewhere."""

    replica: int
    begins_s: float
    ends_s: float = math.inf
    """From here on it is given requests again."""


def changes(outages: Sequence[Outage]) -> list[tuple[float, int, bool]]:
    """Return (time, replica, whether it is lost then or comes back), the next one last."""
    begins = [(each.begins_s, each.replica, True) for each in outages]
    return sorted([*begins, *((each.ends_s, each.replica, False) for each in outages)])[::-1]


class SimulatedReplica:
    """What a replica's ranks are busy with, and what they have done. Used for one run."""

    def __init__(
        self, scheduler: Scheduler, engine: EngineModel, *, stages: int, block_size: int
    ) -> None:
        """Put the parts together.

        Args:
            scheduler: fresh, with a window of `stages`.
            engine: the times of steps and copies.
            stages: pipeline stages.
            block_size: tokens of a KV block.
        """
        self.scheduler = scheduler
        self.pipeline = Pipeline(stages)
        self.copy_engine = SimulatedCopies(engine, block_size)
        self._engine = engine
        self.block_size = block_size
        self.steps = self.slices = self.decode_tokens = self.prefill_tokens = 0

    @property
    def swapped_tokens(self) -> int:
        """Room of the blocks copied so far, in either direction."""
        copies = self.copy_engine.stats()
        return (copies.swapped_out_blocks + copies.swapped_in_blocks) * self.block_size

    def dispatch(self, plan: Plan, now: float) -> Iterator[tuple[float, SimulatedStep | CopyDone]]:
        """Begin what a plan says; yields when each part of it will be done."""
        for copy in plan.copies:
            yield self.copy_engine.start(copy, now), CopyDone(copy.copy_id)
        if not plan.batch:
            return
        work = step_work(plan.batch)
        self.steps += 1
        self.slices += len(plan.batch)
        self.decode_tokens += work.decode_slices
        self.prefill_tokens += work.tokens - work.decode_slices
        pipeline, engine = self.pipeline, self._engine
        ready_s = self.copy_engine.ready_s(plan.step_id, now, pipeline.first_stage_free_s)
        done_s = pipeline.run(ready_s, engine.stage_times(work), engine.hop_times(work.tokens))
        yield done_s + engine.step_overhead_s, SimulatedStep(plan, now)
