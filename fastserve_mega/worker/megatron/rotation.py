"""Rotary position embedding: its frequencies, their scaling, and the angles of a step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastserve_mega.models.architecture import Rope, RopeScaling


def rotary_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians per position of each pair that is rotated, on the CPU in float32."""
    size = head_dim if rope.size is None else rope.size
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
    frequencies = 1.0 / (rope.theta**exponents)
    scaling = rope.scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "longrope":
        return frequencies / torch.tensor(scaling.pair_factors)
    kept = _kept_by_turns if scaling.kind == "llama3" else _kept_by_pairs
    keep = kept(frequencies, scaling, rope.theta)
    return keep * frequencies + (1.0 - keep) * frequencies / scaling.factor


def _kept_by_turns(frequencies: Tensor, scaling: RopeScaling, theta: float) -> Tensor:
    """Share of each frequency that llama3 leaves as it is; it slows down the low ones."""
    del theta
    turns = frequencies * (scaling.original_max_context / (2 * math.pi))
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return ((turns - low) / (high - low)).clamp(0.0, 1.0)


def _kept_by_pairs(frequencies: Tensor, scaling: RopeScaling, theta: float) -> Tensor:
    """Frequencies for yarn, which blends linearly over the pairs of dimensions."""
    pairs = frequencies.shape[0]

    def pair_with(turns: float) -> float:
        """The dimension whose frequency makes that many turns within the original context."""
        return (
            pairs * math.log(scaling.original_max_context / (turns * 2 * math.pi)) / math.log(theta)
        )

    first, last = pair_with(scaling.high_freq_factor), pair_with(scaling.low_freq_factor)
    if scaling.whole_pairs:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    width = last - first or 0.001
    ramp = (torch.arange(pairs, dtype=torch.float32) - first) / width
    return 1.0 - ramp.clamp(0.0, 1.0)


class Rotation:
    """The rotation of one kind of attention, for any positions.

    Args:
        rope: angles and scaling.
        head_dim: dimensions of a head.
        device: where the positions are.
    """

    def __init__(self, rope: Rope, head_dim: int, device: torch.device) -> None:
        self.frequencies = rotary_frequencies(rope, head_dim).to(device)
        self.factor = rope.scaling.attention_factor if rope.scaling else 1.0

    def at(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines for attention's `_rotate`, each [tokens, 1, 1, rotated]."""
        angles = positions[:, None].float() * self.frequencies
        cosine, sine = angles.cos() * self.factor, angles.sin() * self.factor
        cosine = torch.cat((cosine, cosine), dim=-1).to(dtype)
        sine = torch.cat((-sine, sine), dim=-1).to(dtype)
        return cosine[:, None, None], sine[:, None, None]
