"""Paged attention over a batch that mixes decoding and prefilling sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastserve_mega.worker.kv_cache import KvCache
from fastserve_mega.worker.step_batch import DecodeGroup, PrefillSpan, StepBatch

_CPU_QUERY_TILE = 128
"""New tokens of a prompt that attend at a time on a CPU. It bounds the memory of the scores, and
a tile skips the keys behind its last token."""


@dataclass(frozen=True, slots=True)
class _Decode:
    rows: slice
    sequences: int
    index: Tensor
    """Index for KvCache.read."""
    mask: Tensor
    """[sequences * kv_heads, 1, tokens] added to the scores."""


@dataclass(frozen=True, slots=True)
class _Tile:
    """Some new tokens of one sequence, and the keys they may attend to."""

    rows: slice
    """Counted from the sequence's first row."""
    keys: int
    """Keys [0, keys) are looked at."""
    mask: Tensor
    """[query heads per key-value head * rows, keys] added to the scores."""


@dataclass(frozen=True, slots=True)
class _Prefill:
    rows: slice
    index: Tensor | None
    """Index for KvCache.read; None when all keys are new, and need no reading."""
    tiles: tuple[_Tile, ...]


class StepAttention(Protocol):
    """Attention in one step, for all layers of a kind: by torch, or by kernels of our own."""

    def attend(self, layer: int, qkv: Tensor, scale: float) -> Tensor:
        """Rotate queries and keys, write keys and values to the cache, and attend.

        Args:
            layer: of this rank.
            qkv: [tokens, kv_heads, group_size + 2, head_dim], contiguous; may be changed.
            scale: of the scores.

        Returns:
            [tokens, query heads * head_dim]
        """


class TorchAttention:
    """What attention by torch needs to know about a step.

    Args:
        step: the batch.
        cache: this rank's pool.
        rotation: cosines and sines for the step's positions; None where nothing is rotated.
        group_size: query heads per key-value head.
        num_kv_heads: key-value heads of this rank.
        window: a token attends to this many tokens at most; None is no limit.
        softcap: scores stay between minus and plus this; None is no limit.
    """

    def __init__(
        self,
        step: StepBatch,
        cache: KvCache,
        *,
        rotation: tuple[Tensor, Tensor] | None,
        group_size: int,
        num_kv_heads: int,
        window: int | None,
        softcap: float | None = None,
    ) -> None:
        self._cache = cache
        self._rotation = rotation
        self._softcap = softcap
        self._write_index = cache.write_index(step.slots)
        self._group_size = group_size
        self._num_kv_heads = num_kv_heads
        self._window = window
        self._decodes = [self._plan_decode(group) for group in step.decode]
        self._prefills = [self._plan_prefill(span) for span in step.prefill]

    def _plan_decode(self, group: DecodeGroup) -> _Decode:
        sequences, blocks = group.block_tables.shape
        keys = torch.arange(blocks * self._cache.block_size, device=group.contexts.device)
        mask = self._mask(group.contexts[:, None] - 1, keys)
        return _Decode(
            rows=group.rows,
            sequences=sequences,
            index=self._cache.read_index(group.block_tables),
            mask=mask.repeat_interleave(self._num_kv_heads, dim=0)[:, None],
        )

    def _plan_prefill(self, span: PrefillSpan) -> _Prefill:
        count = span.rows.stop - span.rows.start
        tile = _CPU_QUERY_TILE if self._cache.pool.device.type == "cpu" else count
        starts = range(0, count, tile)
        # What is quantized is read back, so that a token does not depend on the chunks.
        reads = span.start > 0 or self._cache.is_quantized
        return _Prefill(
            rows=span.rows,
            index=self._cache.read_index(span.block_table) if reads else None,
            tiles=tuple(
                self._tile(span.start, first, min(first + tile, count)) for first in starts
            ),
        )

    def _tile(self, start: int, first: int, end: int) -> _Tile:
        device = self._cache.pool.device
        queries = torch.arange(start + first, start + end, device=device)
        mask = self._mask(queries[:, None], torch.arange(start + end, device=device))
        return _Tile(
            rows=slice(first, end), keys=start + end, mask=mask.repeat(self._group_size, 1)
        )

    def _mask(self, queries: Tensor, keys: Tensor) -> Tensor:
        """0 where the query's position may see the key's, else -inf: [queries, keys]."""
        hidden = keys > queries
        if self._window is not None:
            hidden |= keys <= queries - self._window
        mask = torch.zeros(hidden.shape, dtype=self._cache.dtype, device=hidden.device)
        return mask.masked_fill_(hidden, -torch.inf)

    def attend(self, layer: int, qkv: Tensor, scale: float) -> Tensor:
        group = self._group_size
        if self._rotation is not None:
            rotated = self._rotation[0].shape[-1]
            _rotate(qkv[:, :, : group + 1, :rotated], *self._rotation)
        self._cache.write(layer, self._write_index, qkv[:, :, group:])
        query = qkv[:, :, :group]
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for decode in self._decodes:
            self._decode(decode, layer, query, out, scale)
        for prefill in self._prefills:
            self._prefill(prefill, layer, qkv, out, scale)
        return out.view(out.shape[0], -1)

    def _decode(self, part: _Decode, layer: int, query: Tensor, out: Tensor, scale: float) -> None:
        key, value = self._cache.read(layer, part.index, part.sequences)
        # The query heads that share a key-value head are the rows of one small matrix.
        q = query[part.rows].flatten(0, 1)
        attended = self._attend(q, key, value, part.mask, scale)
        out[part.rows] = attended.view_as(out[part.rows])

    def _prefill(self, part: _Prefill, layer: int, qkv: Tensor, out: Tensor, scale: float) -> None:
        group = self._group_size
        fresh = qkv[part.rows].transpose(0, 1)  # [kv_heads, tokens, group + 2, head_dim]
        if part.index is None:
            key, value = fresh[:, :, group], fresh[:, :, group + 1]
        else:
            key, value = self._cache.read(layer, part.index, 1)
        query = fresh[:, :, :group].transpose(1, 2)  # [kv_heads, group, tokens, head_dim]
        target = out[part.rows].permute(1, 2, 0, 3)
        for tile in part.tiles:
            q = query[:, :, tile.rows]
            k, v = key[:, : tile.keys], value[:, : tile.keys]
            attended = self._attend(q.flatten(1, 2), k, v, tile.mask, scale)
            target[:, :, tile.rows] = attended.view(q.shape)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        """Softmax(q k^T * scale + mask) v; q [n, rows, d], k and v [n, keys, d]."""
        if self._softcap is not None:
            scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale / self._softcap).tanh_()
            scores = scores.mul_(self._softcap).add_(mask)
        elif q.device.type == "cuda":
            return functional.scaled_dot_product_attention(
                q[None], k[None], v[None], attn_mask=mask[None], scale=scale
            )[0]
        else:
            # Two to three times faster on a CPU than scaled_dot_product_attention.
            mask = mask.expand(q.shape[0], q.shape[1], k.shape[1])
            scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale)
        return torch.bmm(scores.softmax(dim=-1), v)


class PagedAttention(nn.Module):
    """Megatron's `core_attention`: rotation, KV write, and attention of one layer.

    Args:
        config: Megatron's TransformerConfig.
        layer_number: counted from 1 within this rank's stage.
        **unused: what Megatron gives its own kinds of attention.
    """

    def __init__(
        self, *, config: Any, layer_number: int, pg_collection: Any, **unused: Any
    ) -> None:
        super().__init__()
        del unused
        self.layer = layer_number - 1
        self.group_size: int = config.num_attention_heads // config.num_query_groups
        self.scale: float = config.softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(self, qkv: Tensor, step: StepAttention) -> Tensor:
        """[tokens, kv_heads, group_size + 2, head_dim] → [tokens, query heads * head_dim]."""
        return step.attend(self.layer, qkv, self.scale)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> None:
    """Rotate pairs (i, i + size/2) of x [tokens, heads, n, size], in place.

    cosine and sine are [tokens, 1, 1, size]; the sine's first half is negated already.
    """
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    x.mul_(cosine).addcmul_(swapped, sine)
