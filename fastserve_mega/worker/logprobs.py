"""Log probabilities of sampled tokens, for the requests that ask for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastserve_mega.types import TokenLogprobs
from fastserve_mega.worker.model_runner import SequenceInput
from fastserve_mega.worker.transfer import to_device


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
            rows = to_device(torch.tensor([row for row, _ in self._wanted]), logits.device)
            self._logprobs = torch.log_softmax(logits.index_select(0, rows), dim=-1)

    def of(self, tokens: Sequence[int]) -> tuple[TokenLogprobs | None, ...]:
        """Log probabilities of one sampled token for each row; None for rows that do not ask.

        Empty when no row asks.
        """
        if not self._wanted:
            return ()
        chosen = torch.tensor([[tokens[row]] for row, _ in self._wanted])
        own = self._logprobs.gather(-1, to_device(chosen, self._logprobs.device))
        most = min(max(top for _, top in self._wanted), self._logprobs.shape[-1])
        values, ids = self._logprobs.topk(most, dim=-1)
        # Together, since the host waits for each; float64 holds every id.
        together = torch.cat((own.double(), values.double(), ids.double()), dim=-1).tolist()
        told: list[TokenLogprobs | None] = [None] * self._count
        for (row, top), numbers in zip(self._wanted, together, strict=True):
            top_ids = tuple(int(number) for number in numbers[1 + most : 1 + most + top])
            told[row] = TokenLogprobs(numbers[0], top_ids, tuple(numbers[1 : 1 + min(top, most)]))
        return tuple(told)
