"""Log probabilities of sampled tokens, for the requests that ask for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastserve_mega.types import TokenLogprobs
from fastserve_mega.worker.model_runner import SequenceInput


class ModelDistribution:
    """The model's own distribution, of the rows that ask for log probabilities.

    Take it before the logits are changed.

    Args:
        logits: [sequences, vocabulary] as the model gave them.
        sequences: one for each row.
    """

    def __init__(self, logits: Tensor, sequences: Sequence[SequenceInput]) -> None:
        asked = [(row, s.params.logprobs) for row, s in enumerate(sequences)]
        self._count = len(sequences)
        self._wanted = [(row, top) for row, top in asked if top is not None]
        if self._wanted:
            # Indexing copies, so these stay what they are.
            rows = logits[[row for row, _ in self._wanted]]
            self._logprobs = torch.log_softmax(rows, dim=-1)

    def of(self, tokens: Sequence[int]) -> tuple[TokenLogprobs | None, ...]:
        """Log probabilities of one sampled token for each row; None for rows that do not ask.

        Empty when no row asks.
        """
        if not self._wanted:
            return ()
        device = self._logprobs.device
        chosen = torch.tensor([[tokens[row]] for row, _ in self._wanted], device=device)
        own = self._logprobs.gather(-1, chosen).flatten().tolist()
        most = min(max(top for _, top in self._wanted), self._logprobs.shape[-1])
        top_logprobs, top_ids = (each.tolist() for each in self._logprobs.topk(most, dim=-1))
        told: list[TokenLogprobs | None] = [None] * self._count
        for index, (row, top) in enumerate(self._wanted):
            told[row] = TokenLogprobs(
                own[index], tuple(top_ids[index][:top]), tuple(top_logprobs[index][:top])
            )
        return tuple(told)
