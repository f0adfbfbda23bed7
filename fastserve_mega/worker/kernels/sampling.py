"""Draws tokens on the device, one program a row, without the host knowing anything of the row.

The rules are those of `worker.sampler`: filters are thresholds on the value, the token is found by
its place in the cumulative distribution, in the order of the vocabulary. A threshold is found by
bisecting the bits of a float, whose order is that of the numbers; a row lies in the device's cache
meanwhile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastserve_mega.worker.kernels import launching
from fastserve_mega.worker.kernels.launching import padded

_COLUMNS = 4096
"""Tokens that a program looks at at a time."""


@triton.jit
def _weight(logits, token, real, largest, temperature, floor):
    """Weigh tokens that passed the filters so far: 0 for those whose weight is below the floor."""
    value = tl.load(logits + token, mask=real, other=float("-inf")).to(tl.float32)
    weight = tl.exp((value - largest) / temperature)
    return tl.where(real & (weight >= floor), weight, 0.0)


@triton.jit
def _held(logits, vocabulary, largest, temperature, floor, COLUMNS: tl.constexpr):
    """Sum up what the tokens weigh that passed the filters so far."""
    total = vocabulary * tl.full([], 0.0, tl.float64)
    for first in range(0, vocabulary, COLUMNS):
        token = first + tl.arange(0, COLUMNS)
        weight = _weight(logits, token, token < vocabulary, largest, temperature, floor)
        total += tl.sum(weight.to(tl.float64), 0)
    return total


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["numbers"])
def _draw(
    logits, numbers, drawn, rows, vocabulary, stride,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """One row. `numbers` are temperature, top_k, top_p, min_p and the random number of each."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    temperature = tl.load(numbers + row).to(tl.float32)
    top_k = tl.load(numbers + rows + row)
    top_p = tl.load(numbers + 2 * rows + row)
    min_p = tl.load(numbers + 3 * rows + row).to(tl.float32)
    random = tl.load(numbers + 4 * rows + row)
    columns = tl.arange(0, COLUMNS)

    largest = row * 0.0 - float("inf")
    best = vocabulary * 0
    undefined = vocabulary * 0
    for first in range(0, vocabulary, COLUMNS):
        value = tl.load(
            logits + first + columns, mask=first + columns < vocabulary, other=float("-inf")
        ).to(tl.float32)
        undefined += tl.sum((value != value).to(tl.int32), 0)  # noqa: PLR0124 - NaN
        highest = tl.max(value, 0)
        if highest > largest:
            # The first of equals.
            best = first + tl.min(tl.where(value == highest, columns, COLUMNS), 0)
            largest = highest
    told = tl.where(undefined > 0, float("nan"), largest)
    tl.store(drawn + 2 * row + 1, told.to(tl.float64))
    if temperature <= 0.0:
        tl.store(drawn + 2 * row, best.to(tl.float64))
        return

    # Weights are in [0, 1]: bit patterns from 0 to that of 1.0.
    floor = min_p
    if top_k > 0.0:
        low = vocabulary * 0
        high = low + 0x3F800000
        while low < high:
            middle = low + (high - low + 1) // 2
            bound = middle.to(tl.float32, bitcast=True)
            count = row * 0.0
            for first in range(0, vocabulary, COLUMNS):
                token = first + columns
                weight = _weight(logits, token, token < vocabulary, largest, temperature, bound)
                count += tl.sum((weight > 0.0).to(tl.float32), 0)
            if count >= top_k:
                low = middle
            else:
                high = middle - 1
        floor = tl.maximum(floor, low.to(tl.float32, bitcast=True))

    total = _held(logits, vocabulary, largest, temperature, floor, COLUMNS)
    if top_p < 1.0:
        low = vocabulary * 0
        high = low + 0x3F800000
        while low < high:
            middle = low + (high - low + 1) // 2
            bound = tl.maximum(middle.to(tl.float32, bitcast=True), floor)
            held = _held(logits, vocabulary, largest, temperature, bound, COLUMNS)
            if held >= top_p * total:
                low = middle
            else:
                high = middle - 1
        floor = tl.maximum(floor, low.to(tl.float32, bitcast=True))
        total = _held(logits, vocabulary, largest, temperature, floor, COLUMNS)

    # As many tokens lie before the chosen one as have no more in and before them than the target.
    target = random * total
    before = row * tl.full([], 0.0, tl.float64)
    chosen = vocabulary * 0
    last = vocabulary * 0
    for first in range(0, vocabulary, COLUMNS):
        real = first + columns < vocabulary
        weight = _weight(logits, first + columns, real, largest, temperature, floor)
        cumulative = before + tl.cumsum(weight.to(tl.float64), 0)
        chosen += tl.sum((real & (cumulative <= target)).to(tl.int32), 0)
        before += tl.sum(weight.to(tl.float64), 0)
        last = tl.maximum(last, tl.max(tl.where(weight > 0.0, first + columns, 0), 0))
    # Rounding must not reach beyond the last token that has a weight.
    tl.store(drawn + 2 * row, tl.minimum(chosen, last).to(tl.float64))


def draw(logits: Tensor, numbers: Tensor) -> Tensor:
    """Draw a token for each row; the host waits for nothing.

    Args:
        logits: [rows, vocabulary], whose rows are contiguous.
        numbers: [5, rows] in float64: temperature (0 is greedy), top_k (0 keeps all), top_p,
            min_p, and the random number in [0, 1).

    Returns:
        [rows, 2] in float64: of each row its token, and its largest logit, or NaN if one is.
    """
    rows, vocabulary = logits.shape
    drawn = torch.empty((rows, 2), dtype=torch.float64, device=logits.device)
    launching.launch(
        _draw, (rows,), logits, numbers, drawn, rows, vocabulary, logits.stride(0),
        COLUMNS=min(_COLUMNS, padded(vocabulary)), num_warps=8,
    )  # fmt: skip
    return drawn
