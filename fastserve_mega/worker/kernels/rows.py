"""Kernels over the rows of activations: norms with the residual, and activations with the gate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastserve_mega.worker.kernels import launching
from fastserve_mega.worker.kernels.launching import padded

_KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
_COLUMNS = 1024
"""Outputs of an activation that a program computes."""


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm or LayerNorm."""

    weight: Tensor
    """[hidden]"""
    bias: Tensor | None
    epsilon: float
    is_centered: bool
    """LayerNorm: the mean is taken off."""
    offset: float
    """Added to the weight: 1 where it is kept as its difference from 1."""


@triton.jit
def _norm(
    x, residual, weight, bias, out, total, epsilon, offset,
    HIDDEN: tl.constexpr, COLUMNS: tl.constexpr, CENTERED: tl.constexpr, BIASED: tl.constexpr,
    ADDED: tl.constexpr,
):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64) * HIDDEN
    columns = tl.arange(0, COLUMNS)
    real = columns < HIDDEN
    values = tl.load(x + row + columns, mask=real, other=0.0)
    if ADDED:
        values = values + tl.load(residual + row + columns, mask=real, other=0.0)
        tl.store(total + row + columns, values, mask=real)
    wide = values.to(tl.float32)
    if CENTERED:
        wide = tl.where(real, wide - tl.sum(wide, 0) / HIDDEN, 0.0)
    wide = wide * (1.0 / tl.sqrt(tl.sum(wide * wide, 0) / HIDDEN + epsilon))
    wide = wide * (tl.load(weight + columns, mask=real, other=0.0).to(tl.float32) + offset)
    if BIASED:
        wide = wide + tl.load(bias + columns, mask=real, other=0.0).to(tl.float32)
    tl.store(out + row + columns, wide.to(out.dtype.element_ty), mask=real)


@triton.jit
def _activate(
    x, out, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr
):
    """Some columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real = columns < WIDTH
    at = x + row * (2 * WIDTH if GATED else WIDTH) + columns
    value = tl.load(at, mask=real, other=0.0).to(tl.float32)
    if KIND == 0:
        value = value / (1.0 + tl.exp(-value))
    elif KIND == 1:
        value = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    elif KIND == 2:
        inner = 0.7978845608028654 * (value + 0.044715 * value * value * value)
        # tanh, without overflow
        decay = tl.exp(-2.0 * tl.abs(inner))
        bounded = (1.0 - decay) / (1.0 + decay)
        value = 0.5 * value * (1.0 + tl.where(inner < 0, -bounded, bounded))
    else:
        value = tl.maximum(value, 0.0)
    if GATED:
        # Rounded as between two operations.
        value = value.to(x.dtype.element_ty).to(tl.float32)
        value = value * tl.load(at + WIDTH, mask=real, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + columns, value.to(out.dtype.element_ty), mask=real)


def norm(x: Tensor, weights: Norm) -> Tensor:
    """Norm each row of x [tokens, hidden]."""
    out = torch.empty_like(x)
    _launch_norm(x, None, weights, out, x)
    return out


def add_and_norm(x: Tensor, residual: Tensor, weights: Norm) -> tuple[Tensor, Tensor]:
    """The sum of x and residual [tokens, hidden], normed, and the sum itself."""
    out, total = torch.empty_like(x), torch.empty_like(x)
    _launch_norm(x, residual, weights, out, total)
    return out, total


def _launch_norm(
    x: Tensor, residual: Tensor | None, weights: Norm, out: Tensor, total: Tensor
) -> None:
    tokens, hidden = x.shape
    launching.launch(
        _norm, (tokens,), x, x if residual is None else residual, weights.weight,
        weights.weight if weights.bias is None else weights.bias, out, total,
        weights.epsilon, weights.offset,
        HIDDEN=hidden, COLUMNS=padded(hidden), CENTERED=weights.is_centered,
        BIASED=weights.bias is not None, ADDED=residual is not None,
        num_warps=4 if hidden <= 2048 else 8,
    )  # fmt: skip


def activate(x: Tensor, kind: str, *, gated: bool) -> Tensor:
    """The activation of x [tokens, width], or of its first half times the second if gated."""
    tokens, width = x.shape[0], x.shape[1] // (2 if gated else 1)
    out = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    columns = min(_COLUMNS, padded(width))
    launching.launch(
        _activate, (tokens, -(-width // columns)), x, out,
        WIDTH=width, COLUMNS=columns, KIND=_KINDS[kind], GATED=gated,
    )  # fmt: skip
    return out
