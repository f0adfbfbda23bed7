"""What a simulation must know of the engine it stands for, and of a step to ask it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from fastserve_mega.plan import SequenceSlice


class StepWork(NamedTuple):
    """What the slices of one step add up to."""

    tokens: int
    sampled: int
    """Slices that yield a token."""
    decode_slices: int
    """Slices of one token."""
    decode_context: int
    """KV tokens they read."""
    prefill_context: int
    """KV tokens read by longer slices."""
    prefill_pairs: int
    """Query-key pairs of longer slices, the causal half only."""
    earlier_pairs: int = 0
    """Query-key pairs of longer slices with tokens of earlier steps."""


def step_work(batch: Iterable[SequenceSlice]) -> StepWork:
    """Add up a batch."""
    tokens = sampled = decode_slices = decode_context = prefill_context = prefill_pairs = 0
    earlier_pairs = 0
    for piece in batch:
        start, num_tokens, samples = piece.start, piece.num_tokens, piece.samples
        tokens += num_tokens
        if samples:
            sampled += 1
        if num_tokens == 1:
            decode_slices += 1
            decode_context += start + 1
        else:
            prefill_context += start + num_tokens
            earlier_pairs += num_tokens * start
            prefill_pairs += num_tokens * start + num_tokens * (num_tokens + 1) // 2
    return StepWork(
        tokens, sampled, decode_slices, decode_context, prefill_context, prefill_pairs,
        earlier_pairs,
    )  # fmt: skip


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
