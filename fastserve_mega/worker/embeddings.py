"""Embeddings of prompts, for the requests that ask for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fastserve_mega.worker.model_runner import SequenceInput
from fastserve_mega.worker.transfer import to_device


class Embeddings:
    """The embeddings that a step's batch asks for: last hidden states, scaled to length 1.

    Args:
        batch: of the step.
    """

    def __init__(self, batch: Sequence[SequenceInput]) -> None:
        sampled = [sequence for sequence in batch if sequence.samples]
        self._rows = [row for row, sequence in enumerate(sampled) if sequence.embeds]
        self._vectors: Tensor | None = None

    def __call__(self, normed: Tensor) -> None:
        """Take the hidden states behind the final norm, [samples, hidden], once."""
        if not self._rows:
            return
        rows = to_device(torch.tensor(self._rows), normed.device)
        self._vectors = functional.normalize(normed.index_select(0, rows).float(), dim=-1)

    def result(self) -> tuple[bytes, ...]:
        """When the rows were taken; see `StepOutput.embeddings`."""
        if self._vectors is None:
            return ()
        return tuple(vector.astype("<f4").tobytes() for vector in self._vectors.cpu().numpy())
