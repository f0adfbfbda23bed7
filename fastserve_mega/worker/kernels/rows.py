"""Kernels over the rows of activations: norms with the residual, and activations with the gate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastserve_mega.worker.float8 import LARGEST_FLOAT8, LEAST_SCALED, Float8Rows
from fastserve_mega.worker.kernels import launching
from fastserve_mega.worker.kernels.launching import padded

_KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
_COLUMNS = 1024
"""Outputs of an activation that a program computes."""

Rows = Tensor | Float8Rows
"""[tokens, width] in the precision of the model, or in 8 bits."""


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
    is_scaled: bool = False
    """The result has 8 bits, since it is multiplied by weights that have."""


@triton.jit
def store_scaled(values, out, scales, real, LARGEST: tl.constexpr, LEAST: tl.constexpr) -> None:
    """What is real of one row, else 0, as `worker.float8.quantize_rows` scales it."""
    scale = tl.maximum(tl.max(tl.abs(values)), LEAST) / LARGEST
    small = tl.clamp(values / scale, -LARGEST, LARGEST)
    tl.store(out, small.to(out.dtype.element_ty), mask=real)
    tl.store(scales, scale)


# The scales of a step's last rows begin anywhere.
@triton.jit(do_not_specialize_on_alignment=["scales"])
def _scale(
    x, out, scales,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    real = columns < WIDTH
    values = tl.load(x + row * WIDTH + columns, mask=real, other=0.0).to(tl.float32)
    store_scaled(values, out + row * WIDTH + columns, scales + row, real, LARGEST, LEAST)


@triton.jit
def _norm(
    x, residual, weight, bias, out, total, scales, epsilon, offset,
    HIDDEN: tl.constexpr, COLUMNS: tl.constexpr, CENTERED: tl.constexpr, BIASED: tl.constexpr,
    ADDED: tl.constexpr, SCALED: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr,
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
    if SCALED:
        # Rounded as between two operations.
        wide = wide.to(x.dtype.element_ty).to(tl.float32)
        store_scaled(wide, out + row + columns, scales + tl.program_id(0), real, LARGEST, LEAST)
    else:
        tl.store(out + row + columns, wide.to(out.dtype.element_ty), mask=real)


@triton.jit
def _activate(
    x, out, scales,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr,
    SCALED: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """Some columns of one row, all of them if they are scaled."""
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
    if SCALED:
        value = value.to(x.dtype.element_ty).to(tl.float32)
        store_scaled(value, out + row * WIDTH + columns, scales + row, real, LARGEST, LEAST)
    else:
        tl.store(out + row * WIDTH + columns, value.to(out.dtype.element_ty), mask=real)


def norm(x: Tensor, weights: Norm) -> Rows:
    """Norm each row of x [tokens, hidden]."""
    return _launch_norm(x, None, weights, x)


def add_and_norm(x: Tensor, residual: Tensor, weights: Norm) -> tuple[Rows, Tensor]:
    """The sum of x and residual [tokens, hidden], normed, and the sum itself."""
    total = torch.empty_like(x)
    return _launch_norm(x, residual, weights, total), total


def _launch_norm(x: Tensor, residual: Tensor | None, weights: Norm, total: Tensor) -> Rows:
    tokens, hidden = x.shape
    made, out, scales = _room((tokens, hidden), x, is_scaled=weights.is_scaled)
    launching.launch(
        _norm, (tokens,), x, x if residual is None else residual, weights.weight,
        weights.weight if weights.bias is None else weights.bias, out, total, scales,
        weights.epsilon, weights.offset,
        HIDDEN=hidden, COLUMNS=padded(hidden), CENTERED=weights.is_centered,
        BIASED=weights.bias is not None, ADDED=residual is not None,
        num_warps=4 if hidden <= 2048 else 8, **float8_range(weights.is_scaled),
    )  # fmt: skip
    return made


def activate(x: Tensor, kind: str, *, gated: bool, is_scaled: bool = False) -> Rows:
    """The activation of x [tokens, width], or of its first half times the second if gated."""
    tokens, width = x.shape[0], x.shape[1] // (2 if gated else 1)
    made, out, scales = _room((tokens, width), x, is_scaled=is_scaled)
    columns = padded(width) if is_scaled else min(_COLUMNS, padded(width))
    launching.launch(
        _activate, (tokens, -(-width // columns)), x, out, scales,
        WIDTH=width, COLUMNS=columns, KIND=_KINDS[kind], GATED=gated, **float8_range(is_scaled),
        num_warps=4 if columns <= 4096 else 16,
    )  # fmt: skip
    return made


def scale_rows(x: Tensor, made: Float8Rows) -> None:
    """Make each row of x [tokens, width] one of 8 bits, as `worker.float8.quantize_rows` does."""
    tokens, width = x.shape
    launching.launch(
        _scale, (tokens,), x, made.values, made.scales,
        WIDTH=width, COLUMNS=padded(width), LARGEST=LARGEST_FLOAT8, LEAST=LEAST_SCALED,
        num_warps=4 if width <= 4096 else 8,
    )  # fmt: skip


def _room(shape: tuple[int, int], like: Tensor, *, is_scaled: bool) -> tuple[Rows, Tensor, Tensor]:
    """What is to be made, its values, and its scales or anything."""
    if not is_scaled:
        out = torch.empty(shape, dtype=like.dtype, device=like.device)
        return out, out, out
    made = Float8Rows.empty(shape, like)
    return made, made.values, made.scales


def float8_range(is_scaled: bool) -> dict[str, float | bool]:
    return {"SCALED": is_scaled, "LARGEST": LARGEST_FLOAT8, "LEAST": LEAST_SCALED}
