"""How kernels see the KV cache, and the kernel that writes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastserve_mega.worker.float8 import LARGEST_FLOAT8
from fastserve_mega.worker.kernels import launching
from fastserve_mega.worker.kernels.launching import padded
from fastserve_mega.worker.kv_cache import KvCache


@dataclass(frozen=True, slots=True)
class Pages:
    """The pool of a `KvCache`, flat."""

    data: Tensor
    """All of it, in the type of the keys and values."""
    scales: Tensor
    """That memory as bfloat16 where keys and values have 8 bits, else `data` again."""
    block_size: int
    page_size: int
    """Elements of `data` from one page to the next."""
    pages_per_block: int
    is_quantized: bool

    @classmethod
    def of(cls, cache: KvCache) -> Pages:
        """Look at a cache; nothing is copied."""
        pool, pages_per_block = cache.pool.view(-1), cache.pages_per_block
        return cls(
            data=pool.view(torch.float8_e4m3fn) if cache.is_quantized else pool,
            scales=pool.view(torch.bfloat16) if cache.is_quantized else pool,
            block_size=cache.block_size,
            page_size=cache.pool[0].numel() // pages_per_block,
            pages_per_block=pages_per_block,
            is_quantized=cache.is_quantized,
        )


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """RMSNorm of each head's query and key before they are rotated."""

    query: Tensor
    key: Tensor
    """[head_dim] both."""
    epsilon: float
    offset: float
    """Added to the weights: 1 where they are kept as their difference from 1."""


@dataclass(frozen=True, slots=True)
class Turns:
    """Rotary position embedding."""

    frequencies: Tensor
    """[head_dim / 2] radians per position, float32."""
    factor: float
    """Cosines and sines are multiplied by it."""


@triton.jit
def _normed(low, high, weight, dims, real, epsilon, offset, HEAD_DIM: tl.constexpr):
    """RMSNorm over two halves, [n, head_dim / 2] each."""
    square = tl.sum(low * low, 1) + tl.sum(high * high, 1)
    shrink = (1.0 / tl.sqrt(square / HEAD_DIM + epsilon))[:, None]
    low_weight = tl.load(weight + dims, mask=real, other=0.0).to(tl.float32) + offset
    high_weight = (
        tl.load(weight + HEAD_DIM // 2 + dims, mask=real, other=0.0).to(tl.float32) + offset
    )
    return low * shrink * low_weight[None, :], high * shrink * high_weight[None, :]


@triton.jit
def _store_half(pool, low, high, dims, real, HEAD_DIM: tl.constexpr):
    tl.store(pool + dims, low.to(pool.dtype.element_ty), mask=real)
    tl.store(pool + HEAD_DIM // 2 + dims, high.to(pool.dtype.element_ty), mask=real)


@triton.jit
def _scale_of(low, high, LARGEST: tl.constexpr):
    """What 8-bit values are multiplied with, rounded as it is kept."""
    most = tl.maximum(tl.max(tl.abs(low), 0), tl.max(tl.abs(high), 0))
    return (tl.maximum(most, 1e-30) / LARGEST).to(tl.bfloat16)


@triton.jit
def _clamped(x, scale, LARGEST: tl.constexpr):
    return tl.minimum(tl.maximum(x / scale.to(tl.float32), -LARGEST), LARGEST)


@triton.jit(
    do_not_specialize=["layer_page", "block_pages"],
    do_not_specialize_on_alignment=["slots", "positions"],
)
def _rotate_and_write(
    qkv, pool, scales, slots, positions, frequencies, query_norm, key_norm,
    layer_page, block_pages, factor, epsilon, offset,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr, PAGE: tl.constexpr, ROTATED: tl.constexpr,
    NORMED: tl.constexpr, QUANTIZED: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """One token and key-value head: its queries in place, its key and value to the cache.

    HEADS is the padded number of query heads and the key together.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dims = tl.arange(0, HALF)
    real = dims < HEAD_DIM // 2
    columns = tl.arange(0, HEADS)
    at = qkv + (token * KV_HEADS + head) * (GROUP + 2) * HEAD_DIM
    own = (columns < GROUP + 1)[:, None] & real[None, :]
    in_low = columns[:, None] * HEAD_DIM + dims[None, :]
    in_high = in_low + HEAD_DIM // 2
    low = tl.load(at + in_low, mask=own, other=0.0).to(tl.float32)
    high = tl.load(at + in_high, mask=own, other=0.0).to(tl.float32)
    if NORMED:
        q_low, q_high = _normed(low, high, query_norm, dims, real, epsilon, offset, HEAD_DIM)
        k_low, k_high = _normed(low, high, key_norm, dims, real, epsilon, offset, HEAD_DIM)
        is_key = (columns == GROUP)[:, None]
        # Rounded as between two operations.
        low = tl.where(is_key, k_low, q_low).to(qkv.dtype.element_ty).to(tl.float32)
        high = tl.where(is_key, k_high, q_high).to(qkv.dtype.element_ty).to(tl.float32)
    if ROTATED:
        position = tl.load(positions + token).to(tl.float32)
        angle = position * tl.load(frequencies + dims, mask=real, other=0.0)
        cosine = (tl.cos(angle) * factor)[None, :]
        sine = (tl.sin(angle) * factor)[None, :]
        turned = low * cosine - high * sine
        high = high * cosine + low * sine
        low = turned
    is_query = own & (columns < GROUP)[:, None]
    tl.store(at + in_low, low.to(qkv.dtype.element_ty), mask=is_query)
    tl.store(at + in_high, high.to(qkv.dtype.element_ty), mask=is_query)

    slot = tl.load(slots + token)
    if slot < 0:
        return
    page = slot // BLOCK_SIZE * block_pages + layer_page + head
    inside = slot % BLOCK_SIZE
    to_key = pool + page * PAGE + inside * HEAD_DIM
    to_value = to_key + KV_HEADS * PAGE
    key_low = tl.sum(tl.where((columns == GROUP)[:, None], low, 0.0), 0)
    key_high = tl.sum(tl.where((columns == GROUP)[:, None], high, 0.0), 0)
    at_value = at + (GROUP + 1) * HEAD_DIM + dims
    value_low = tl.load(at_value, mask=real, other=0.0).to(tl.float32)
    value_high = tl.load(at_value + HEAD_DIM // 2, mask=real, other=0.0).to(tl.float32)
    if QUANTIZED:
        to_scale = scales + page * (PAGE // 2) + BLOCK_SIZE * HEAD_DIM // 2 + inside
        key_scale = _scale_of(key_low, key_high, LARGEST)
        value_scale = _scale_of(value_low, value_high, LARGEST)
        tl.store(to_scale, key_scale)
        tl.store(to_scale + KV_HEADS * (PAGE // 2), value_scale)
        key_low = _clamped(key_low, key_scale, LARGEST)
        key_high = _clamped(key_high, key_scale, LARGEST)
        value_low = _clamped(value_low, value_scale, LARGEST)
        value_high = _clamped(value_high, value_scale, LARGEST)
    _store_half(to_key, key_low, key_high, dims, real, HEAD_DIM)
    _store_half(to_value, value_low, value_high, dims, real, HEAD_DIM)


def rotate_and_write(
    qkv: Tensor,
    pages: Pages,
    layer: int,
    slots: Tensor,
    positions: Tensor,
    *,
    turns: Turns | None,
    norm: HeadNorm | None,
) -> None:
    """Rotate queries and keys, and write keys and values to the cache.

    Args:
        qkv: [tokens, kv_heads, group + 2, head_dim], contiguous; its queries are changed in place.
        pages: the cache.
        layer: of this rank.
        slots: [tokens] where their keys and values go; rows without a slot write none.
        positions: [tokens].
        turns: None where nothing is rotated.
        norm: None where heads are not normed.
    """
    tokens, kv_heads, columns, head_dim = qkv.shape
    heads, half = padded(columns - 1, 2), padded(head_dim // 2, 2)
    launching.launch(
        _rotate_and_write, (tokens, kv_heads),
        qkv, pages.data, pages.scales, slots, positions,
        qkv if turns is None else turns.frequencies,
        qkv if norm is None else norm.query, qkv if norm is None else norm.key,
        layer * 2 * kv_heads, pages.pages_per_block,
        1.0 if turns is None else turns.factor,
        0.0 if norm is None else norm.epsilon, 0.0 if norm is None else norm.offset,
        KV_HEADS=kv_heads, GROUP=columns - 2, HEADS=heads, HEAD_DIM=head_dim,
        HALF=half, BLOCK_SIZE=pages.block_size, PAGE=pages.page_size,
        ROTATED=turns is not None, NORMED=norm is not None, QUANTIZED=pages.is_quantized,
        LARGEST=LARGEST_FLOAT8, num_warps=1 if heads * half <= 1024 else 4,
    )  # fmt: skip
