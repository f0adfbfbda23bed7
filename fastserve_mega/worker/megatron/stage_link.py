"""What the stages of a pipeline hand over to each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fastserve_mega.system.partition import Partition
from fastserve_mega.worker.model_runner import SequenceInput


class StageLink:
    """One rank's links to its neighbours: the same tensor rank of the stages before and behind.

    Args:
        partition: of this rank.
        hidden_size: of the model.
        device: of the activations.
    """

    def __init__(self, partition: Partition, hidden_size: int, device: torch.device) -> None:
        self._partition = partition
        self._hidden_size = hidden_size
        self._device = device
        self._sending: tuple[dist.Work, Tensor] | None = None

    def receive(self, batch: Sequence[SequenceInput], dtype: torch.dtype) -> Tensor | None:
        """What the stage before hands over, [tokens, hidden]; None on the first stage."""
        if self._partition.is_first_stage:
            return None
        tokens = sum(len(sequence.token_ids) for sequence in batch)
        hidden = torch.empty((tokens, self._hidden_size), dtype=dtype, device=self._device)
        dist.recv(hidden, src=dist.get_rank() - self._partition.tensor_size)
        return hidden

    def send(self, hidden: Tensor) -> None:
        """Hand over to the next stage without waiting until it has time for it.

        Args:
            hidden: [tokens, hidden]; nobody writes to it before the next call has returned.
        """
        self.finish()
        work = dist.isend(hidden, dst=dist.get_rank() + self._partition.tensor_size)
        if work is not None:
            self._sending = (work, hidden)

    def finish(self) -> None:
        """Wait until what was sent has gone."""
        if self._sending is not None:
            self._sending[0].wait()
            self._sending = None
