"""Chooses tokens from logits, for the whole batch at once.

The random number of a token depends on the request's seed and the token's position only. A
request that is preempted, moved or resumed, alone or in any batch, therefore goes on with the
random numbers it would have had.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastserve_mega.messaging.messages import SamplingFailure
from fastserve_mega.worker.grammar import GrammarError, Grammars
from fastserve_mega.worker.logprobs import ModelDistribution
from fastserve_mega.worker.penalties import add_logit_bias, penalize
from fastserve_mega.worker.runner import SequenceInput, StepOutput

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


class Sampler:
    """Samples by the rules of each request's SamplingParams.

    Args:
        eos_token_ids: end-of-sequence tokens of the model, held back by `min_tokens`.
        grammars: what structured output is held to; None refuses it.
    """

    def __init__(self, eos_token_ids: Sequence[int], grammars: Grammars | None = None) -> None:
        self._eos_token_ids = tuple(eos_token_ids)
        self._grammars = grammars

    def __call__(self, logits: Tensor, sequences: Sequence[SequenceInput]) -> StepOutput:
        """One token for each row of `logits` [sequences, vocabulary], which may be changed."""
        logits = logits.float()
        distribution = ModelDistribution(logits, sequences)
        failures = self._hold_to_grammars(logits, sequences)
        self._hold_back_stop_tokens(logits, sequences)
        add_logit_bias(logits, sequences)
        penalize(logits, sequences)
        tokens = _choose(logits, sequences)
        return StepOutput(tokens, distribution.of(tokens), failures)

    def _hold_to_grammars(
        self, logits: Tensor, sequences: Sequence[SequenceInput]
    ) -> tuple[SamplingFailure, ...]:
        failures = []
        for row, sequence in enumerate(sequences):
            if sequence.params.structured is None or sequence.history is None:
                continue
            try:
                if self._grammars is None:
                    raise GrammarError("this rank has no structured output")
                self._grammars.hold(logits[row], sequence.params.structured, sequence.history)
            except GrammarError as error:
                failures.append(SamplingFailure(row, str(error)))
        return tuple(failures)

    def _hold_back_stop_tokens(self, logits: Tensor, sequences: Sequence[SequenceInput]) -> None:
        vocabulary = logits.shape[-1]
        for row, sequence in enumerate(sequences):
            if sequence.context - sequence.prompt_tokens >= sequence.params.min_tokens:
                continue
            stops = {*self._eos_token_ids, *sequence.params.stop_token_ids}
            held_back = [token for token in stops if token < vocabulary]
            logits[row, held_back] = -torch.inf


def _choose(logits: Tensor, sequences: Sequence[SequenceInput]) -> list[int]:
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    random_rows = [row for row, sequence in enumerate(sequences) if not _is_greedy(sequence)]
    if random_rows:
        chosen = _sample(logits[random_rows], [sequences[row] for row in random_rows])
        for row, token in zip(random_rows, chosen, strict=True):
            tokens[row] = token
    return tokens


def _is_greedy(sequence: SequenceInput) -> bool:
    return sequence.params.temperature == 0 or sequence.params.top_k == 1


def _sample(logits: Tensor, sequences: Sequence[SequenceInput]) -> list[int]:
    """Inverse-CDF sampling, in the order of the vocabulary, of the tokens that pass the filters.

    The filters are thresholds on the value, so tokens of equal probability are kept or dropped
    together, and nothing depends on how a sort breaks ties.
    """

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    params = [sequence.params for sequence in sequences]
    # A tiny temperature must not overflow: the largest logit becomes 0.
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
