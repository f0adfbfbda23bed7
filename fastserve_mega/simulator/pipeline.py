"""When steps and copies begin and end on the simulated mesh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastserve_mega.plan import BlockCopy, CopyDirection
from fastserve_mega.simulator.engine_model import EngineModel


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
