"""Changes to logits that a request asks for: what it allows, bias, penalties for what it has.

Only the logits concerned are touched, for all sequences at once, and nothing is done for a batch
that asks for none of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastserve_mega.types import SamplingParams
from fastserve_mega.worker.history import TokenHistory
from fastserve_mega.worker.model_runner import SequenceInput
from fastserve_mega.worker.transfer import to_device

_LEAST_FACTOR = 1e-30
"""Smaller repetition penalties do what this one does: float32 holds any logit divided by it."""


def keep_allowed(logits: Tensor, sequences: Sequence[SequenceInput]) -> None:
    """Make all but the `allowed_token_ids` of a request impossible in its row, in place."""
    for row, sequence in enumerate(sequences):
        if allowed := sequence.params.allowed_token_ids:
            ids = to_device(torch.tensor(allowed), logits.device)
            kept = logits[row, ids]
            logits[row] = -torch.inf
            logits[row, ids] = kept


def last_of_bad_words(sequence: SequenceInput) -> list[int]:
    """Tokens that would complete one of the request's `bad_words`."""
    output = sequence.history.output if sequence.history is not None else []
    return [
        last
        for *begun, last in sequence.params.bad_words
        # Most are found out by their last token but one.
        if not begun or (output and output[-1] == begun[-1] and output[-len(begun) :] == begun)
    ]


def add_logit_bias(logits: Tensor, sequences: Sequence[SequenceInput]) -> None:
    """Add each request's `logit_bias` to its row of `logits` [sequences, vocabulary], in place."""
    rows: list[int] = []
    ids: list[int] = []
    bias: list[float] = []
    for row, sequence in enumerate(sequences):
        if chosen := sequence.params.logit_bias:
            rows += [row] * len(chosen)
            ids += chosen.keys()
            bias += chosen.values()
    if rows:
        index = to_device(torch.tensor([rows, ids]), logits.device)
        added = to_device(torch.tensor(bias, dtype=logits.dtype), logits.device)
        logits[index[0], index[1]] += added


def penalize(logits: Tensor, sequences: Sequence[SequenceInput]) -> None:
    """Apply presence, frequency and repetition penalties to `logits` [sequences, vocabulary].

    In place. As in vLLM: the repetition penalty is for tokens of prompt and output, and comes
    first; the other two are for tokens of the output.
    """
    penalized = [
        (row, sequence.params, sequence.history)
        for row, sequence in enumerate(sequences)
        if sequence.history is not None and sequence.params.counts_tokens
    ]
    if penalized:
        _penalize(logits, penalized)


def _penalize(logits: Tensor, penalized: list[tuple[int, SamplingParams, TokenHistory]]) -> None:
    lengths = [len(history.counts.ids) for _, _, history in penalized]

    def spread(values: list[float]) -> Tensor:
        """A value of each sequence, for each of its tokens."""
        repeated = np.repeat(np.array(values, dtype=np.float32), lengths)
        return to_device(torch.from_numpy(repeated), logits.device)

    def joined(arrays: list[Any]) -> Tensor:
        return to_device(torch.from_numpy(np.concatenate(arrays)), logits.device)

    rows = joined([np.repeat([row for row, _, _ in penalized], lengths)])
    ids = joined([history.counts.ids for _, _, history in penalized])
    counts = joined([history.counts.counts for _, _, history in penalized])
    factor = spread([max(params.repetition_penalty, _LEAST_FACTOR) for _, params, _ in penalized])
    values = logits[rows, ids]
    values = torch.where(values > 0, values / factor, values * factor)
    values -= spread([params.frequency_penalty for _, params, _ in penalized]) * counts
    values -= spread([params.presence_penalty for _, params, _ in penalized]) * (counts > 0)
    # Saturate upwards; downwards infinity is right, as it means impossible.
    logits[rows, ids] = values.clamp_(max=torch.finfo(values.dtype).max)
