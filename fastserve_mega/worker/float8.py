"""Rows of numbers in 8 bits (float8_e4m3fn), each with a scale, and products of them.

A weight [outputs, inputs] has a scale for each output, and what it is multiplied with has one for
each token, which is made as it comes. So a product needs no calibration.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

LARGEST_FLOAT8 = 448.0
"""The largest number of float8_e4m3fn, which has no infinity: what is larger becomes NaN."""
LEAST_SCALED = 1e-30
"""Keeps the scale of a row of zeros from being 0."""
_TILE = 16
"""The sizes of a weight that torch multiplies in 8 bits are multiples of this."""
FIRST_FLOAT8_CAPABILITY = (8, 9)
"""CUDA devices compute in 8 bits from this one on: Ada and Hopper."""


@dataclass(frozen=True, slots=True)
class Float8Rows:
    """A matrix whose rows are scaled."""

    values: Tensor
    """[rows, columns] in float8_e4m3fn."""
    scales: Tensor
    """[rows] in float32, by which the values are to be multiplied."""
    dtype: torch.dtype
    """Precision of what it stands for, and of products with it."""

    @classmethod
    def empty(cls, shape: tuple[int, int], like: Tensor) -> Float8Rows:
        """Room for what stands for rows of the precision of `like`, and on its device."""
        values = torch.empty(shape, dtype=torch.float8_e4m3fn, device=like.device)
        scales = torch.empty(shape[0], dtype=torch.float32, device=like.device)
        return cls(values, scales, like.dtype)

    def part(self, rows: slice) -> Float8Rows:
        """Some of its rows, in the same memory."""
        return Float8Rows(self.values[rows], self.scales[rows], self.dtype)


def quantize_rows(x: Tensor) -> Float8Rows:
    """Scale each row of x [rows, columns] so that its largest number is the largest of 8 bits."""
    wide = x.float()
    scales = wide.abs().amax(dim=-1).clamp_(min=LEAST_SCALED) / LARGEST_FLOAT8
    # Rounding may carry the largest beyond the range.
    wide = (wide / scales[:, None]).clamp_(-LARGEST_FLOAT8, LARGEST_FLOAT8)
    return Float8Rows(wide.to(torch.float8_e4m3fn), scales, x.dtype)


def widen(values: Tensor, scales: Tensor) -> Tensor:
    """[rows, columns] in float32, of what is scaled by row."""
    return values.float() * scales[:, None]


def multiply(x: Tensor | Float8Rows, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply by the transpose of a weight in 8 bits, and add the bias.

    Products are summed up in float32. Where the device does not compute in 8 bits, or the result
    is not bfloat16, the numbers are the same and the matrices are widened first, which is slow.

    Args:
        x: [tokens, inputs]; scaled by token here, if it is not yet.
        weight: [outputs, inputs] in float8_e4m3fn.
        scales: [outputs] in float32.
        bias: [outputs] in the precision of the result.

    Returns:
        [tokens, outputs]
    """
    rows = x if isinstance(x, Float8Rows) else quantize_rows(x)
    if rows.dtype != torch.bfloat16 or not _multiplies(weight):
        y = functional.linear(widen(rows.values, rows.scales), widen(weight, scales))
        return (y if bias is None else y + bias).to(rows.dtype)
    return torch._scaled_mm(
        rows.values,
        weight.t(),
        scale_a=rows.scales[:, None],
        scale_b=scales[None, :],
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def _multiplies(weight: Tensor) -> bool:
    """Whether torch multiplies with this one in 8 bits."""
    fits = weight.shape[0] % _TILE == 0 and weight.shape[1] % _TILE == 0
    return fits and (weight.device.type != "cuda" or _is_able(weight.device))


@cache
def _is_able(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= FIRST_FLOAT8_CAPABILITY
