"""The paged KV pool of one rank, on its device."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

from fastserve_mega.worker.float8 import LARGEST_FLOAT8, LEAST_SCALED

NULL_BLOCK = 0
"""Never written, so always zero; it pads every block table."""
_HUGE_PAGE = 2 << 20
"""Bytes."""


class KvCache:
    """Keys and values of all requests, in blocks of `block_size` tokens.

    The pool is one tensor [blocks, layers, 2, kv_heads, block_size, head_dim]. All layers of a
    block are contiguous, so a block moves to host memory in one copy; the tokens of one head in a
    block are contiguous, so what attention reads is gathered in whole block rows and needs no
    transposition. Index 0 of the third dimension holds keys, 1 holds values.

    A quantized cache keeps float8_e4m3fn and, for each token and head, a scale in bfloat16. Its
    pool is of bytes, [blocks, layers, 2, kv_heads, page]; a page holds the tokens of a head in a
    block, [block_size, head_dim], and then their [block_size] scales. So the scales move with
    their block.

    Args:
        num_blocks: of the pool, the null block included.
        num_layers: of this rank.
        num_kv_heads: of this rank.
        block_size: tokens in a block.
        head_dim: elements of a key or a value.
        dtype: in which keys and values come and go.
        device: of the pool.
        quantized: keep 8 bits of each.

    Raises:
        ValueError: there is no room for the null block and one more.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        num_layers: int,
        num_kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        quantized: bool = False,
    ) -> None:
        if num_blocks < 2:
            raise ValueError(
                f"a KV pool needs at least 2 blocks (block 0 is the null block), got {num_blocks}"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.is_quantized = quantized
        self.pages_per_block = num_layers * 2 * num_kv_heads
        self._num_kv_heads = num_kv_heads
        self._head_dim = head_dim
        rows_per_layer = 2 * num_kv_heads
        layers = range(num_layers)
        outer = (num_blocks, num_layers, 2, num_kv_heads)
        # Row indices are computed once per step for layer 0; layer n uses the same indices on a
        # view that starts at its own rows.
        if quantized:
            page = block_size * (head_dim + torch.bfloat16.itemsize)
            self.pool = _zeros((*outer, page), torch.uint8, device)
            block_rows = self.pool.view(-1, page)
            in_page = block_size * head_dim
            values = block_rows[:, :in_page].view(-1, block_size, head_dim)
            scales = block_rows.view(torch.bfloat16)[:, in_page // torch.bfloat16.itemsize :]
            self._values = [values[n * rows_per_layer :] for n in layers]
            self._scales = [scales[n * rows_per_layer :] for n in layers]
        else:
            shape = (*outer, block_size, head_dim)
            self.pool = _zeros(shape, dtype, device)
            block_rows = self.pool.view(-1, block_size * head_dim)
            token_rows = self.pool.view(-1, head_dim)
            self._token_rows = [token_rows[n * rows_per_layer * block_size :] for n in layers]
        self._block_rows = [block_rows[n * rows_per_layer :] for n in layers]
        kinds_and_heads = torch.arange(rows_per_layer, device=device)
        self._kinds_and_heads = kinds_and_heads.view(2, num_kv_heads)

    def write_index(self, slots: Tensor) -> Tensor:
        """Rows to write for `slots` [tokens], where slot = block * block_size + offset.

        Returns:
            [tokens * kv_heads * 2], to be given to `write`.
        """
        block = torch.div(slots, self.block_size, rounding_mode="floor")
        offset = slots - block * self.block_size
        row = self._first_row(block)[:, None, None] + self._kinds_and_heads.t()
        return (row * self.block_size + offset[:, None, None]).flatten()

    def read_index(self, block_tables: Tensor) -> Tensor:
        """Rows to gather for `block_tables` [sequences, blocks].

        Returns:
            [2 * sequences * kv_heads * blocks], to be given to `read`.
        """
        first = self._first_row(block_tables)
        return (first[None, :, None, :] + self._kinds_and_heads[:, None, :, None]).flatten()

    def write(self, layer: int, index: Tensor, key_value: Tensor) -> None:
        """Store keys and values [tokens, kv_heads, 2, head_dim] of one layer of this rank."""
        rows = key_value.reshape(-1, self._head_dim)
        if self.is_quantized:
            self._write_quantized(layer, index, rows)
        else:
            self._token_rows[layer].index_copy_(0, index, rows)

    def _write_quantized(self, layer: int, index: Tensor, rows: Tensor) -> None:
        page = torch.div(index, self.block_size, rounding_mode="floor")
        offset = index - page * self.block_size
        wide = rows.float()
        most = wide.abs().amax(dim=-1).clamp_(min=LEAST_SCALED)
        scales = (most / LARGEST_FLOAT8).bfloat16()
        # Their rounding may have carried the largest beyond the range.
        small = (wide / scales.float()[:, None]).clamp_(-LARGEST_FLOAT8, LARGEST_FLOAT8)
        values = small.to(torch.float8_e4m3fn).view(torch.uint8)
        self._values[layer].index_put_((page, offset), values)
        self._scales[layer].index_put_((page, offset), scales)

    def read(self, layer: int, index: Tensor, sequences: int) -> tuple[Tensor, Tensor]:
        """Gather keys and values, each [sequences * kv_heads, tokens, head_dim]."""
        rows = self._block_rows[layer].index_select(0, index)
        if self.is_quantized:
            rows = self._dequantized(rows)
        shape = (2, sequences * self._num_kv_heads, -1, self._head_dim)
        key, value = rows.view(shape).unbind(0)
        return key, value

    def _dequantized(self, pages: Tensor) -> Tensor:
        """[n, bytes of a page] → [n, block_size, head_dim]."""
        in_page = self.block_size * self._head_dim
        scales = pages.view(torch.bfloat16)[:, in_page // torch.bfloat16.itemsize :]
        values = pages[:, :in_page].view(torch.float8_e4m3fn).to(self.dtype)
        return values.view(-1, self.block_size, self._head_dim).mul_(scales[..., None])

    def clear(self, blocks: Tensor) -> None:
        """Zero whole blocks [n] before a new owner reads them.

        Masking the scores of slots not yet written is not enough: a NaN or an infinity that the
        last owner left among the values would still give 0 * NaN = NaN.
        """
        if blocks.numel():
            self.pool.index_fill_(0, blocks, 0)

    def _first_row(self, blocks: Tensor) -> Tensor:
        return blocks * self.pages_per_block


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU with Linux in huge pages, since attention reads 2 KB here and 2 KB there."""
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags)
    memory.madvise(mmap.MADV_HUGEPAGE)
    plain = torch.frombuffer(memory, dtype=torch.uint8)
    start = -plain.data_ptr() % _HUGE_PAGE
    # Touched now, so that memory that is not there is missed at the start.
    return plain[start : start + num_bytes].view(dtype).view(shape).zero_()
