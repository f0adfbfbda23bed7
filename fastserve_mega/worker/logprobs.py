"""Log probabilities of tokens, for the requests that ask for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastserve_mega.messaging.rank_messages import ScoredPrompt
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
            self._logprobs = torch.log_softmax(logits.index_select(0, rows).float(), dim=-1)

    def of(self, tokens: Sequence[int]) -> tuple[TokenLogprobs | None, ...]:
        """Log probabilities of one sampled token for each row; None for rows that do not ask.

        Empty when no row asks.
        """
        if not self._wanted:
            return ()
        chosen = [tokens[row] for row, _ in self._wanted]
        tops = [top for _, top in self._wanted]
        told: list[TokenLogprobs | None] = [None] * self._count
        for (row, _), each in zip(self._wanted, _tell(self._logprobs, chosen, tops), strict=True):
            told[row] = each
        return tuple(told)


class PromptScores:
    """The log probabilities of the prompt tokens that a step's batch asks for.

    Called with the logits of the rows that precede them, in the order of the batch, in pieces:
    all at once could be more than memory holds.

    Args:
        batch: of the step; sequences that ask have their history.
    """

    def __init__(self, batch: Sequence[SequenceInput]) -> None:
        self._asking = [(index, each) for index, each in enumerate(batch) if each.scored]
        self._rows = self._all_rows()
        self._told: dict[int, list[TokenLogprobs]] = {index: [] for index, _ in self._asking}

    def __call__(self, logits: Tensor) -> None:
        """Take the next rows of logits, [rows, vocabulary]."""
        rows = [next(self._rows) for _ in range(logits.shape[0])]
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        told = _tell(logprobs, [token for _, token, _ in rows], [top for _, _, top in rows])
        for (index, _, _), each in zip(rows, told, strict=True):
            self._told[index].append(each)

    def result(self) -> tuple[ScoredPrompt, ...]:
        """When all rows were taken."""
        return tuple(
            ScoredPrompt(index, sequence.start + 1, tuple(self._told[index]))
            for index, sequence in self._asking
        )

    def _all_rows(self) -> Iterator[tuple[int, int, int]]:
        """Yield each row's index of its sequence, the token that follows it, and how many tops."""
        for index, sequence in self._asking:
            assert sequence.history is not None
            first = sequence.start + 1
            for token in sequence.history.prompt[first : first + sequence.scored]:
                yield index, token, sequence.params.logprobs or 0


def _tell(logprobs: Tensor, tokens: Sequence[int], tops: Sequence[int]) -> Iterator[TokenLogprobs]:
    """One token's log probability in each row, with so many of the most probable ones."""
    chosen = to_device(torch.tensor(tokens)[:, None], logprobs.device)
    most = min(max(tops, default=0), logprobs.shape[-1])
    values, ids = logprobs.topk(most, dim=-1)
    # Together, since the host waits for each; float64 holds every id.
    own = logprobs.gather(-1, chosen)
    together = torch.cat((own.double(), values.double(), ids.double()), dim=-1).tolist()
    for numbers, top in zip(together, tops, strict=True):
        top_ids = tuple(int(number) for number in numbers[1 + most : 1 + most + top])
        yield TokenLogprobs(numbers[0], top_ids, tuple(numbers[1 : 1 + min(top, most)]))
