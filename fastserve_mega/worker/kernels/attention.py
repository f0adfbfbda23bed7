"""Attention over paged keys and values, for decoding and prefilling sequences alike.

The rows of a tile are (token, query head) pairs that share a key-value head, so that keys and
values are read once for all of them. A page holds the tokens of one head in one block, keys or
values: [block_size, head_dim], and behind them in an 8-bit cache [block_size] scales.

The long context of a decoding sequence is split among several programs, each of which leaves its
part of the softmax (largest score, sum, weighted values); `_merge` puts them together.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastserve_mega.worker.kernels import launching
from fastserve_mega.worker.kernels.launching import padded
from fastserve_mega.worker.kernels.pages import Pages
from fastserve_mega.worker.step_batch import StepBatch

_FULL_DEVICE = 512
"""Programs that keep a large device busy."""
_MOST_SPLITS = 32


# What differs from step to step would be compiled for once more, while requests wait: numbers if
# they are 1, or a multiple of 16, and parts of a step's array if they begin at a multiple of 16
# bytes. What is gained by such knowledge comes from PAGE.
@triton.jit(
    do_not_specialize=["first_sequence", "table_width", "layer_page", "block_pages"],
    do_not_specialize_on_alignment=["tables", "contexts", "first_rows"],
)
def _attend(
    qkv, pool, scales, tables, contexts, first_rows, out, partial, maxima, sums,
    first_sequence, table_width, layer_page, block_pages, scale, softcap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    SPLITS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one sequence and key-value head, over one split of its keys."""
    tile = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    head = tl.program_id(1)
    sequence = first_sequence + tl.program_id(2)
    first_row = tl.load(first_rows + sequence)
    tokens = tl.load(first_rows + sequence + 1) - first_row
    context = tl.load(contexts + sequence)
    row = tile * ROWS + tl.arange(0, ROWS)
    if tile * ROWS >= tl.maximum(tokens, 1) * GROUP:
        return
    dims = tl.arange(0, DIM)
    real_dim = dims < HEAD_DIM
    real_row = row < tokens * GROUP
    token = first_row + row // GROUP
    own = real_row[:, None] & real_dim[None, :]
    in_qkv = ((token * KV_HEADS + head) * (GROUP + 2) + row % GROUP) * HEAD_DIM
    query = tl.load(qkv + in_qkv[:, None] + dims[None, :], mask=own, other=0.0)
    position = context - tokens + row // GROUP

    # Keys [first, last) are seen by some row of the tile.
    last = tl.minimum(context - tokens + (tile * ROWS + ROWS - 1) // GROUP + 1, context)
    first = last * 0
    if WINDOW > 0:
        first = tl.maximum(context - tokens + tile * ROWS // GROUP - WINDOW + 1, 0)
    first = first // KEYS * KEYS
    in_split = tl.cdiv(tl.cdiv(last - first, KEYS), SPLITS) * KEYS
    begin = first + split * in_split
    end = tl.minimum(begin + in_split, last)

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, DIM], tl.float32)
    for key in range(begin, end, KEYS):
        at = key + tl.arange(0, KEYS)
        there = at < end
        block = tl.load(tables + sequence * table_width + at // BLOCK_SIZE, mask=there, other=0)
        page = block * block_pages + layer_page + head
        inside = at % BLOCK_SIZE
        data = page * PAGE + inside * HEAD_DIM
        real = there[:, None] & real_dim[None, :]
        keys = tl.load(pool + data[:, None] + dims[None, :], mask=real, other=0.0)
        # What is not there yet counts as zero: a NaN there would survive its weight of 0.
        at_values = pool + KV_HEADS * PAGE
        values = tl.load(at_values + data[:, None] + dims[None, :], mask=real, other=0.0)
        if QUANTIZED:
            in_scales = page * (PAGE // 2) + BLOCK_SIZE * HEAD_DIM // 2 + inside
            key_scale = tl.load(scales + in_scales, mask=there, other=0.0).to(tl.float32)
            value_scale = tl.load(
                scales + KV_HEADS * (PAGE // 2) + in_scales, mask=there, other=0.0
            ).to(tl.float32)
            keys = keys.to(query.dtype)
            values = values.to(query.dtype)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        if QUANTIZED:
            scores = scores * key_scale[None, :]
        if SOFTCAP:
            # tanh by the exponential of a number that is never positive.
            decay = tl.exp(-2.0 * tl.abs(scores / softcap))
            bounded = (1.0 - decay) / (1.0 + decay) * softcap
            scores = tl.where(scores < 0, -bounded, bounded)
        seen = there[None, :] & (at[None, :] <= position[:, None])
        if WINDOW > 0:
            seen = seen & (at[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, 1))
        # A row that has seen no key yet must not become NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - base[:, None])
        shrink = tl.exp(largest - base)
        total = total * shrink + tl.sum(weights, 1)
        if QUANTIZED:
            weights = weights * value_scale[None, :]
        mixed = mixed * shrink[:, None] + tl.dot(
            weights.to(values.dtype), values, input_precision="ieee"
        )
        largest = higher

    in_out = ((token * KV_HEADS + head) * GROUP + row % GROUP).to(tl.int64)
    if SPLITS == 1:
        mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(
            out + in_out[:, None] * HEAD_DIM + dims[None, :],
            mixed.to(out.dtype.element_ty), mask=own,
        )  # fmt: skip
    else:
        part = in_out * SPLITS + split
        tl.store(partial + part[:, None] * HEAD_DIM + dims[None, :], mixed, mask=own)
        tl.store(maxima + part, largest, mask=real_row)
        tl.store(sums + part, total, mask=real_row)


@triton.jit
def _merge(
    partial, maxima, sums, out,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One row: its splits to its output."""
    row = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, SPLITS)
    dims = tl.arange(0, DIM)
    real = dims < HEAD_DIM
    largest = tl.load(maxima + row * SPLITS + splits)
    highest = tl.max(largest, 0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    share = tl.exp(largest - base)
    total = tl.sum(share * tl.load(sums + row * SPLITS + splits), 0)
    parts = tl.load(
        partial + (row * SPLITS + splits)[:, None] * HEAD_DIM + dims[None, :],
        mask=real[None, :], other=0.0,
    )  # fmt: skip
    mixed = tl.sum(parts * share[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + row * HEAD_DIM + dims, mixed.to(out.dtype.element_ty), mask=real)


def attend(
    qkv: Tensor,
    pages: Pages,
    layer: int,
    step: StepBatch,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attend from all rows of a step to what the cache holds, their own tokens included.

    Args:
        qkv: [tokens, kv_heads, group + 2, head_dim], contiguous; the queries are read.
        pages: the cache, in which the step's keys and values have been written.
        layer: of this rank.
        step: decoding sequences first.
        scale: of the scores.
        window: a token attends to this many tokens at most; None is no limit.
        softcap: scores stay between minus and plus this; None is no limit.

    Returns:
        [tokens, kv_heads * group * head_dim].
    """
    tokens, kv_heads, columns, head_dim = qkv.shape
    group = columns - 2
    out = torch.empty((tokens, kv_heads * group * head_dim), dtype=qkv.dtype, device=qkv.device)
    decodes, sequences = step.num_decodes, step.block_tables.shape[0]
    tile_rows, keys = _tile(padded(head_dim), qkv.dtype.itemsize)
    spans = [span.rows.stop - span.rows.start for span in step.prefill]
    parts = []
    if decodes:
        longest = step.block_tables.shape[1] * pages.block_size
        splits = _splits(decodes * kv_heads, longest, keys)
        parts.append((0, decodes, padded(group), 1, splits))
    if spans:
        rows = max(tile_rows, padded(group))
        tiles = math.ceil(max(spans) * group / rows)
        parts.append((decodes, sequences - decodes, rows, tiles, 1))
    for first, count, rows, tiles, splits in parts:
        partial, maxima, sums = _room_for_splits(out, count * kv_heads * group, head_dim, splits)
        launching.launch(
            _attend, (tiles * splits, kv_heads, count),
            qkv, pages.data, pages.scales, step.block_tables, step.contexts, step.first_rows,
            out, partial, maxima, sums, first, step.block_tables.shape[1],
            layer * 2 * kv_heads, pages.pages_per_block, scale, softcap or 1.0,
            KV_HEADS=kv_heads, GROUP=group, HEAD_DIM=head_dim, DIM=padded(head_dim),
            BLOCK_SIZE=pages.block_size, PAGE=pages.page_size, ROWS=rows, KEYS=keys,
            SPLITS=splits, WINDOW=window or 0, SOFTCAP=softcap is not None,
            QUANTIZED=pages.is_quantized, num_warps=8 if rows > 32 else 4,
        )  # fmt: skip
        if splits > 1:
            launching.launch(
                _merge, (count * kv_heads * group,), partial, maxima, sums, out,
                HEAD_DIM=head_dim, DIM=padded(head_dim), SPLITS=splits,
            )  # fmt: skip
    return out


def _tile(dims: int, itemsize: int) -> tuple[int, int]:
    """Rows of a prefilling sequence, and keys, that a program looks at at a time.

    They are what fits into registers and into the shared memory of smaller devices than an H100.
    """
    if itemsize > 2:
        return 16, 32
    return 64, 64 if dims <= 128 else 32


def _splits(programs: int, longest_context: int, keys: int) -> int:
    """Into how many parts contexts are split; a power of 2, by what is known before the step."""
    wanted = min(_FULL_DEVICE // programs, longest_context // (2 * keys), _MOST_SPLITS)
    return 1 << (wanted.bit_length() - 1) if wanted > 1 else 1


def _room_for_splits(out: Tensor, rows: int, head_dim: int, splits: int) -> tuple[Tensor, ...]:
    if splits == 1:
        return out, out, out  # not touched
    shapes = ((rows, splits, head_dim), (rows, splits), (rows, splits))
    return tuple(torch.empty(s, dtype=torch.float32, device=out.device) for s in shapes)
