"""Attention over paged keys and values, for decoding and prefilling sequences alike.

The rows of a tile are (token, query head) pairs that share a key-value head, so that keys and
values are read once for all of them. A page holds the tokens of one head in one block, keys or
values: [block_size, head_dim], and behind them in an 8-bit cache [block_size] scales.

The long context of a decoding sequence is split among several programs, each of which leaves its
part of the softmax (largest score, sum, weighted values); `_merge` puts them together, and scales
what is to have 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastserve_mega.worker.float8 import Float8Rows
from fastserve_mega.worker.kernels import launching
from fastserve_mega.worker.kernels.launching import padded
from fastserve_mega.worker.kernels.pages import Pages
from fastserve_mega.worker.kernels.rows import Rows, float8_range, scale_rows, store_scaled
from fastserve_mega.worker.step_batch import StepBatch

_FULL_DEVICE = 512
"""Programs that keep a large device busy."""
_MOST_SPLITS = 32


# What differs from step to step would be compiled for once more, while requests wait: numbers if
# they are 1, or a multiple of 16, and parts of a step's array if they begin at a multiple of 16
# bytes. What is gained by such knowledge comes from PAGE.
@triton.jit(
    do_not_specialize=["first_sequence", "table_step", "layer_page", "block_pages"],
    do_not_specialize_on_alignment=["tables", "contexts", "first_rows"],
)
def _attend(
    qkv, pool, scales, tables, contexts, first_rows, out, partial, maxima, sums,
    first_sequence, table_step, layer_page, block_pages, scale, softcap,
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
        block = tl.load(tables + sequence + at // BLOCK_SIZE * table_step, mask=there, other=0)
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
        if begin < end:
            tl.store(partial + part[:, None] * HEAD_DIM + dims[None, :], mixed, mask=own)
        tl.store(maxima + part, largest, mask=real_row)
        tl.store(sums + part, total, mask=real_row)


@triton.jit
def _merge(
    partial, maxima, sums, like, out, scales,
    COUNT: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    SPLITS: tl.constexpr, SCALED: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """COUNT heads of a token, all of them where it is scaled: their splits to their output."""
    head = tl.arange(0, HEADS)
    dims = tl.arange(0, DIM)
    real = head < COUNT
    own = real[:, None] & (dims < HEAD_DIM)[None, :]
    row = tl.program_id(0).to(tl.int64) * COUNT + head
    highest = tl.full([HEADS], float("-inf"), tl.float32)
    for split in tl.static_range(SPLITS):
        largest = tl.load(maxima + row * SPLITS + split, mask=real, other=float("-inf"))
        highest = tl.maximum(highest, largest)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.zeros([HEADS], tl.float32)
    mixed = tl.zeros([HEADS, DIM], tl.float32)
    for split in tl.static_range(SPLITS):
        part = row * SPLITS + split
        largest = tl.load(maxima + part, mask=real, other=float("-inf"))
        share = tl.exp(largest - base)
        total += share * tl.load(sums + part, mask=real, other=0.0)
        at = partial + part[:, None] * HEAD_DIM + dims[None, :]
        # Most splits of a short context that is computed in a recorded step are empty.
        held = own & (largest > float("-inf"))[:, None]
        mixed += share[:, None] * tl.load(at, mask=held, other=0.0)
    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
    to = out + row[:, None] * HEAD_DIM + dims[None, :]
    if SCALED:
        # Rounded as between two operations.
        mixed = mixed.to(like.dtype.element_ty).to(tl.float32)
        store_scaled(mixed, to, scales + tl.program_id(0), own, LARGEST, LEAST)
    else:
        tl.store(to, mixed.to(out.dtype.element_ty), mask=own)


def attend(
    qkv: Tensor,
    pages: Pages,
    layer: int,
    step: StepBatch,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    is_scaled: bool = False,
) -> Rows:
    """Attend from all rows of a step to what the cache holds, their own tokens included.

    Args:
        qkv: [tokens, kv_heads, group + 2, head_dim], contiguous; the queries are read.
        pages: the cache, in which the step's keys and values have been written.
        layer: of this rank.
        step: decoding sequences first.
        scale: of the scores.
        window: a token attends to this many tokens at most; None is no limit.
        softcap: scores stay between minus and plus this; None is no limit.
        is_scaled: the result has 8 bits, since it is multiplied by weights that have.

    Returns:
        [tokens, kv_heads * group * head_dim].
    """
    tokens, kv_heads, columns, head_dim = qkv.shape
    group = columns - 2
    shape = (tokens, kv_heads * group * head_dim)
    out = torch.empty(shape, dtype=qkv.dtype, device=qkv.device)
    scaled = Float8Rows.empty(shape, qkv) if is_scaled else None
    tile_rows, keys = _tile(padded(head_dim), qkv.dtype.itemsize)
    longest = step.block_tables.shape[1] * pages.block_size
    most_splits = _splits(step.num_decodes * kv_heads, longest, keys)
    merged = 0
    for first, count, rows, tiles, splits in _parts(step, group, tile_rows, most_splits):
        partial, maxima, sums = _room_for_splits(out, count * kv_heads * group, head_dim, splits)
        launching.launch(
            _attend, (tiles * splits, kv_heads, count),
            qkv, pages.data, pages.scales, step.block_tables, step.contexts, step.first_rows,
            out, partial, maxima, sums, first, step.block_tables.stride(1),
            layer * 2 * kv_heads, pages.pages_per_block, scale, softcap or 1.0,
            KV_HEADS=kv_heads, GROUP=group, HEAD_DIM=head_dim, DIM=padded(head_dim),
            BLOCK_SIZE=pages.block_size, PAGE=pages.page_size, ROWS=rows, KEYS=keys,
            SPLITS=splits, WINDOW=window or 0, SOFTCAP=softcap is not None,
            QUANTIZED=pages.is_quantized, num_warps=8 if rows > 32 else 4,
        )  # fmt: skip
        if splits > 1:
            merged = count
            _put_together((partial, maxima, sums), count, head_dim, out, scaled)
    if scaled is None:
        return out
    if merged < tokens:
        scale_rows(out[merged:], scaled.part(slice(merged, None)))
    return scaled


def _parts(
    step: StepBatch, group: int, tile_rows: int, splits: int
) -> Iterator[tuple[int, int, int, int, int]]:
    """First sequence, sequences, rows of a tile, tiles of a sequence, and splits, of each kind."""
    decodes = step.num_decodes
    if decodes:
        yield 0, decodes, padded(group), 1, splits
    if step.prefill:
        rows = max(tile_rows, padded(group))
        most = max(span.rows.stop - span.rows.start for span in step.prefill)
        yield decodes, len(step.prefill), rows, math.ceil(most * group / rows), 1


def _put_together(
    splits: tuple[Tensor, ...], rows: int, head_dim: int, out: Tensor, scaled: Float8Rows | None
) -> None:
    """Merge the splits of the first rows, to 8 bits where those are given."""
    heads, num_splits = splits[1].shape[0] // rows, splits[1].shape[1]
    count = heads if scaled else 1
    target, scales = (scaled.values, scaled.scales) if scaled else (out, out)
    launching.launch(
        _merge, (rows * heads // count,), *splits, out, target, scales,
        COUNT=count, HEADS=padded(count, 1), HEAD_DIM=head_dim, DIM=padded(head_dim),
        SPLITS=num_splits, num_warps=16 if count * head_dim > 1024 else 4,
        **float8_range(scaled is not None),
    )  # fmt: skip


def _tile(dims: int, itemsize: int) -> tuple[int, int]:
    """Rows of a prefilling sequence, and keys, that a program looks at at a time.

    They are what fits into registers and into the shared memory of smaller devices than an H100.
    """
    if itemsize > 2:
        return 16, 32
    return 64, 64 if dims <= 128 else 32


def _splits(programs: int, longest_context: int, keys: int) -> int:
    """Into how many parts contexts are split; a power of 2, by what is known before the step."""
    wanted = min(_FULL_DEVICE // max(programs, 1), longest_context // (2 * keys), _MOST_SPLITS)
    return 1 << (wanted.bit_length() - 1) if wanted > 1 else 1


def _room_for_splits(out: Tensor, rows: int, head_dim: int, splits: int) -> tuple[Tensor, ...]:
    if splits == 1:
        return out, out, out  # not touched
    shapes = ((rows, splits, head_dim), (rows, splits), (rows, splits))
    return tuple(torch.empty(s, dtype=torch.float32, device=out.device) for s in shapes)
