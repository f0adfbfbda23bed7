"""Products of rows with the weights of the experts they chose; the host knows of none of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastserve_mega.worker.kernels import launching

_ROWS, _COLUMNS, _DEPTH = 16, 64, 64
"""A program's tile has so many choices, outputs, and inputs at a time."""


@triton.jit
def _multiply_groups(
    x, weights, scales, firsts, order, factors, out, inputs, outputs, chosen,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    IS_LAST: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Some choices of one expert, some of its outputs.

    Before the last product rows are taken from tokens and stay in the order of the experts;
    the last one takes them from there, to the order of the choices, times their factors.
    """
    tile = tl.program_id(0)
    begin = tl.load(firsts + EXPERTS)
    end = begin
    expert = tile * 0
    passed = tile * 0
    for candidate in range(EXPERTS):
        first = tl.load(firsts + candidate)
        following = tl.load(firsts + candidate + 1)
        tiles = tl.cdiv(following - first, ROWS).to(tl.int32)
        if (tile >= passed) & (tile < passed + tiles):
            expert = candidate
            begin = first + (tile - passed) * ROWS
            end = following
        passed += tiles
    if tile >= passed:
        return
    place = begin + tl.arange(0, ROWS)
    real = place < end
    choice = tl.load(order + place, mask=real, other=0)
    row = place if IS_LAST else choice // chosen
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    weight = weights + (expert.to(tl.int64) * outputs + column[None, :]) * inputs
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for at in range(0, inputs, DEPTH):
        inside = at + depth < inputs
        left = tl.load(
            x + row[:, None] * inputs + at + depth[None, :],
            mask=real[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        right = tl.load(
            weight + at + depth[:, None],
            mask=inside[:, None] & (column < outputs)[None, :], other=0.0,
        )  # fmt: skip
        total += tl.dot(left, right.to(left.dtype), input_precision="ieee")
    if SCALED:
        at_scale = scales + expert.to(tl.int64) * outputs + column
        total *= tl.load(at_scale, mask=column < outputs, other=0.0)[None, :]
    target = place
    if IS_LAST:
        # Rounded as between two operations.
        total = total.to(out.dtype.element_ty).to(tl.float32)
        factor = tl.load(factors + choice, mask=real, other=0.0)
        total = total * factor.to(out.dtype.element_ty).to(tl.float32)[:, None]
        target = choice
    tl.store(
        out + target[:, None] * outputs + column[None, :], total.to(out.dtype.element_ty),
        mask=real[:, None] & (column < outputs)[None, :],
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One linear of all of a rank's experts."""

    values: Tensor
    """[experts, outputs, inputs]"""
    scales: Tensor | None = None
    """[experts, outputs] in float32, of values in 8 bits."""


def multiply_groups(
    x: Tensor,
    weights: ExpertWeights,
    firsts: Tensor,
    order: Tensor,
    *,
    chosen: int,
    factors: Tensor | None = None,
) -> Tensor:
    """Multiply rows by the weights of their experts.

    Args:
        x: [tokens, inputs]; with factors [choices, inputs], one expert's behind another's.
        weights: of this rank's experts; what is in 8 bits is widened as it is read.
        firsts: [experts + 1] where the choices of each expert begin in `order`, and their end.
        order: [choices] the choices, one expert's behind another's; choice c is of token
            c // chosen.
        chosen: experts of a token.
        factors: [choices] what the results are multiplied with; None before the last product.

    Returns:
        [choices, outputs], one expert's behind another's; with factors in the order of the
        choices, and zero for those of other ranks' experts.
    """
    experts, outputs, inputs = weights.values.shape
    shape = (order.shape[0], outputs)
    is_last = factors is not None
    make = torch.zeros if is_last else torch.empty
    out = make(shape, dtype=x.dtype, device=x.device)
    # As many tiles as there can be: each expert may have one that is not full.
    tiles = -(-order.shape[0] // _ROWS) + experts
    launching.launch(
        _multiply_groups, (tiles, -(-outputs // _COLUMNS)), x, weights.values,
        x if weights.scales is None else weights.scales, firsts, order,
        x if factors is None else factors, out, inputs, outputs, chosen,
        EXPERTS=experts, ROWS=_ROWS, COLUMNS=_COLUMNS, DEPTH=_DEPTH, IS_LAST=is_last,
        SCALED=weights.scales is not None,
    )  # fmt: skip
    return out
