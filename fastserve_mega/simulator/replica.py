"""One copy of the model in a simulation: a live scheduler, and ranks that are numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastserve_mega.plan import BlockCopy, CopyDirection, Plan
from fastserve_mega.scheduling.events import CopyDone
from fastserve_mega.scheduling.scheduler import Scheduler
from fastserve_mega.simulator.engine_model import EngineModel, step_work


class Pipeline:
    """Stages that each run one batch at a time, in order of the steps."""

    def __init__(self, stages: int) -> None:
        self._free_s = [0.0] * stages
        self.busy_s = 0.0
        """Time the first stage was busy."""

    @property
    def first_stage_free_s(self) -> float:
        """When the first stage will have finished all its batches."""
        return self._free_s[0]

    def run(self, ready_s: float, stage_times: Sequence[float], hops: Sequence[float]) -> float:
        """Stage i starts when stage i-1 of this step and stage i of the step before are done.

        Returns:
            When the last stage is done.
        """
        free_s = self._free_s
        self.busy_s += stage_times[0]
        time_s = ready_s
        for stage, stage_s in enumerate(stage_times):
            start_s = free_s[stage]
            start_s = max(start_s, time_s)
            free_s[stage] = start_s + stage_s
            time_s = start_s + stage_s + hops[stage]
        return time_s


@dataclass(frozen=True, slots=True)
class CopyStats:
    """What the copies of a run cost."""

    swapped_out_blocks: int = 0
    swapped_in_blocks: int = 0
    busy_s: float = 0.0
    """Time the two directions were busy, added up."""
    exposed_s: float = 0.0
    """Time the first stage stood still, waiting for a copy that its next step needs."""

    def __add__(self, other: CopyStats) -> CopyStats:
        """The sum of the two, as of two replicas."""
        return CopyStats(
            self.swapped_out_blocks + other.swapped_out_blocks,
            self.swapped_in_blocks + other.swapped_in_blocks,
            self.busy_s + other.busy_s,
            self.exposed_s + other.exposed_s,
        )


class SimulatedCopies:
    """Copies between device and host, one after the other in each direction, beside compute.

    The directions do not share bandwidth. A copy to the device waits for those from the device
    that still read its target blocks.
    """

    def __init__(self, cost_model: EngineModel, block_size: int) -> None:
        self._cost_model = cost_model
        self._block_size = block_size
        self._free_s = dict.fromkeys(CopyDirection, 0.0)
        self._blocks = dict.fromkeys(CopyDirection, 0)
        self._read_until_s: dict[int, float] = {}
        """Per device block: when the last copy from it is done."""
        self._step_ready_s: dict[int, float] = {}
        self._busy_s = 0.0
        self._exposed_s = 0.0

    def start(self, copy: BlockCopy, now: float) -> float:
        """Queue a copy; returns when it will be done."""
        copy_s = self._cost_model.copy_s(len(copy.source_ids), self._block_size)
        start_s = max(now, self._free_s[copy.direction])
        if copy.direction is CopyDirection.SWAP_IN:
            read_until_s = self._read_until_s
            # A copy has no blocks when all that it was planned for was still on the device.
            start_s = max([start_s, *(read_until_s.get(block, 0.0) for block in copy.target_ids)])
        done_s = start_s + copy_s
        if copy.direction is CopyDirection.SWAP_OUT:
            self._read_until_s.update(dict.fromkeys(copy.source_ids, done_s))
        self._free_s[copy.direction] = done_s
        self._blocks[copy.direction] += len(copy.source_ids)
        self._busy_s += copy_s
        if copy.precedes_step is not None:
            ready_s = self._step_ready_s.get(copy.precedes_step, 0.0)
            self._step_ready_s[copy.precedes_step] = max(ready_s, done_s)
        return done_s

    def ready_s(self, step_id: int, now: float, stage_free_s: float) -> float:
        """When a step dispatched `now` may start, its copies done."""
        ready_s = self._step_ready_s.pop(step_id, now)
        self._exposed_s += max(ready_s - max(now, stage_free_s), 0.0)
        return max(ready_s, now)

    def stats(self) -> CopyStats:
        return CopyStats(
            swapped_out_blocks=self._blocks[CopyDirection.SWAP_OUT],
            swapped_in_blocks=self._blocks[CopyDirection.SWAP_IN],
            busy_s=self._busy_s,
            exposed_s=self._exposed_s,
        )


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
