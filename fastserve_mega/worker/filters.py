"""Top-k, top-p and min-p: what sampling drops, in place.

They are thresholds on the value, so tokens of equal probability are kept or dropped together, and
nothing depends on how a sort breaks ties.
"""

from __future__ import annotations

import torch
from torch import Tensor


def keep_top_k(logits: Tensor, top_k: list[int]) -> None:
    """Drop what is below the k-th largest logit of its row; 0 keeps all. In place."""
    rows = [row for row, k in enumerate(top_k) if k]
    if not rows:
        return
    largest = logits[rows].topk(max(top_k), dim=-1).values
    last = torch.tensor([top_k[row] - 1 for row in rows], device=logits.device)[:, None]
    threshold = largest.gather(-1, last)
    selected = logits[rows]
    logits[rows] = selected.masked_fill_(selected < threshold, -torch.inf)


def keep_min_p(weights: Tensor, min_p: list[float]) -> None:
    """Drop what weighs less than `min_p` of its row's largest, which is 1. In place."""
    if any(min_p):
        threshold = torch.tensor(min_p, dtype=weights.dtype, device=weights.device)[:, None]
        weights.masked_fill_(weights < threshold, 0.0)


def keep_top_p(weights: Tensor, top_p: list[float]) -> None:
    """Drop what is outside the smallest set that holds `top_p` of its row's weight. In place."""
    for row, p in enumerate(top_p):
        if p < 1.0:
            selected = weights[row]
            selected.masked_fill_(selected < _top_p_threshold(selected, p), 0.0)


def _top_p_threshold(weights: Tensor, top_p: float) -> Tensor:
    """The smallest weight that belongs to the set."""
    total = weights.sum(dtype=torch.float64)
    # All tokens below this bound together weigh less than 1 - top_p, so none of them belongs to
    # the set; sorting the few that are left is what makes this cheap.
    bound = total * ((1.0 - top_p) / weights.shape[0])
    candidates = weights[weights >= bound].sort(descending=True).values
    cumulative = candidates.cumsum(dim=0, dtype=torch.float64)
    last = torch.searchsorted(cumulative, top_p * total).clamp(max=candidates.shape[0] - 1)
    return candidates[last]
