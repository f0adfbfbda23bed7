"""Attention by kernels in bfloat16 beside float64, for tools/gpu_check.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastserve_mega.worker.kernels.attention import attend
from fastserve_mega.worker.kernels.pages import Pages, rotate_and_write
from fastserve_mega.worker.kv_cache import KvCache
from fastserve_mega.worker.model_runner import SequenceInput
from fastserve_mega.worker.step_batch import PackedStep


def attention_error(
    device: torch.device, steps: Sequence[list[SequenceInput]], block_size: int
) -> float:
    """The largest error of the last of some steps of one sequence, of numbers around 1."""
    (last,) = steps[-1]
    cache = KvCache(
        num_blocks=2 + last.context // block_size + 1, num_layers=1, num_kv_heads=8,
        block_size=block_size, head_dim=128, dtype=torch.bfloat16, device=device,
    )  # fmt: skip
    known = torch.randn(last.context, 8, 6, 128, device=device).bfloat16()
    pages = Pages.of(cache)
    for batch in steps:
        step = PackedStep(batch, block_size).to(device)
        qkv = known[batch[0].start : batch[0].context].clone()
        rotate_and_write(qkv, pages, 0, step.slots, step.positions, turns=None, norm=None)
    got = attend(qkv, pages, 0, step, scale=0.09, window=None, softcap=None)
    wide = known.double()
    scores = torch.einsum("thgd,shd->hgts", wide[last.start :, :, :4], wide[:, :, 4]) * 0.09
    at = torch.arange(last.context, device=device)
    scores = scores.masked_fill(at > at[last.start :, None], -torch.inf).softmax(-1)
    expected = torch.einsum("hgts,shd->thgd", scores, wide[:, :, 5]).flatten(1)
    return (got - expected).abs().max().item()
