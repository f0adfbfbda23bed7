"""What a simulation must know of the engine it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fastserve_mega.simulator.step_work import StepWork


class EngineModel(Protocol):
    """Times of steps and copies, in seconds."""

    @property
    def step_overhead_s(self) -> float:
        """From the end of a step's last stage until its result is known."""

    def stage_times(self, work: StepWork) -> Sequence[float]:
        """How long each stage is busy with a step."""

    def hop_times(self, tokens: int) -> Sequence[float]:
        """From the end of each stage to the next one's start; 0 after the last."""

    def copy_s(self, blocks: int, block_size: int) -> float:
        """How long KV blocks take between device and host."""
