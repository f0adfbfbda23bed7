"""Draws tokens from logits: the largest, or one at random of those that pass the filters.

Top-k, top-p and min-p are thresholds on the value, so tokens of equal probability are kept or
dropped together, and nothing depends on how a sort breaks ties.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from fastserve_mega.worker.model_runner import SequenceInput
from fastserve_mega.worker.native.library import NativeError, load_library

_MASK = 2**64 - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15


def _mix(value: int) -> int:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014): every input bit matters."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def uniform(seed: int, position: int) -> float:
    """The random number of the token at `position`, in [0, 1).

    The seed is mixed before the position is added, so that the streams of neighbouring seeds are
    not shifted copies of each other.
    """
    state = (_mix((seed + _GOLDEN_GAMMA) & _MASK) + position * _GOLDEN_GAMMA) & _MASK
    return (_mix(state) >> 11) * 2.0**-53


def find_largest(logits: Tensor) -> tuple[list[int], list[float]]:
    """Where each row of `logits` [rows, columns] has its largest value, and the value.

    The first one of several that are equal. A NaN is larger than anything. On CPUs in one pass
    over them and on one thread: torch takes several passes, and its threads wait for each other as
    long as another process has their cores.
    """
    rows, columns = logits.shape
    usable = logits.device.type == "cpu" and logits.dtype == torch.float32
    if not (usable and logits.is_contiguous()):
        return _by_torch(logits)
    try:
        library = load_library()
    except NativeError:
        return _by_torch(logits)
    tokens, values = (ctypes.c_int32 * rows)(), (ctypes.c_float * rows)()
    library.find_largest(logits.data_ptr(), rows, columns, tokens, values)
    return list(tokens), list(values)


def _by_torch(logits: Tensor) -> tuple[list[int], list[float]]:
    best = logits.argmax(dim=-1, keepdim=True)
    return best.squeeze(-1).tolist(), logits.gather(-1, best).squeeze(-1).tolist()


def draw_at_random(logits: Tensor, sequences: Sequence[SequenceInput]) -> list[int]:
    """Inverse-CDF sampling, in the order of the vocabulary, of the tokens that pass the filters.

    Args:
        logits: [sequences, vocabulary], in float32.
        sequences: one for each row, none of them greedy.
    """

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    params = [sequence.params for sequence in sequences]
    # A small temperature must not overflow: the largest logit becomes 0.
    logits = logits - logits.amax(dim=-1, keepdim=True)
    logits = logits / column([p.temperature for p in params]).float()
    vocabulary = logits.shape[-1]
    _keep_top_k(logits, [p.top_k if 0 < p.top_k < vocabulary else 0 for p in params])
    weights = logits.exp_()
    _keep_min_p(weights, [p.min_p for p in params])
    _keep_top_p(weights, [p.top_p for p in params])
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    uniforms = column([uniform(s.seed, s.context) for s in sequences])
    total = cumulative[:, -1:]
    # Rounding must not reach the total, which lies behind the last token.
    target = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    chosen = torch.searchsorted(cumulative, target, right=True)
    return [int(token) for token in chosen.clamp_(max=vocabulary - 1).flatten().tolist()]


def _keep_top_k(logits: Tensor, top_k: list[int]) -> None:
    """Drop what is below the k-th largest logit of its row; 0 keeps all. In place."""
    rows = [row for row, k in enumerate(top_k) if k]
    if not rows:
        return
    largest = logits[rows].topk(max(top_k), dim=-1).values
    last = torch.tensor([top_k[row] - 1 for row in rows], device=logits.device)[:, None]
    threshold = largest.gather(-1, last)
    selected = logits[rows]
    logits[rows] = selected.masked_fill_(selected < threshold, -torch.inf)


def _keep_min_p(weights: Tensor, min_p: list[float]) -> None:
    """Drop what weighs less than `min_p` of its row's largest, which is 1. In place."""
    if any(min_p):
        threshold = torch.tensor(min_p, dtype=weights.dtype, device=weights.device)[:, None]
        weights.masked_fill_(weights < threshold, 0.0)


def _keep_top_p(weights: Tensor, top_p: list[float]) -> None:
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
