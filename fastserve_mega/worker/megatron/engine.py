"""What computes the steps of a stage: the seam between the runner and torch or C++."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fastserve_mega.models.architecture import Architecture, AttentionKind
from fastserve_mega.system.partition import Partition
from fastserve_mega.worker.kv_cache import KvCache
from fastserve_mega.worker.megatron.attention import StepAttention, TorchAttention
from fastserve_mega.worker.megatron.model import Stage
from fastserve_mega.worker.megatron.rotation import Rotation
from fastserve_mega.worker.model_runner import SequenceInput
from fastserve_mega.worker.step_batch import PackedStep, StepBatch

Receive = Callable[[], Tensor | None]
"""Gives what the stage before hands over, [tokens, hidden]; None on the first stage."""


TakeRows = Callable[[Tensor], None]
"""Takes what was computed of rows, in pieces, in order: see `PromptScores` and `Embeddings`."""
_SCORED_AT_ONCE = 256
"""Rows: their logits must fit beside everything else."""


def ignore(_: Tensor) -> None:
    """For steps, and ranks, of which nothing but tokens is wanted."""


class StageEngine(Protocol):
    """Computes the steps of one rank's stage."""

    @property
    def hidden_dtype(self) -> torch.dtype:
        """Precision of what a stage hands over to the next."""

    def run(
        self,
        batch: Sequence[SequenceInput],
        receive: Receive,
        score: TakeRows = ignore,
        embed: TakeRows = ignore,
        drawn: TakeRows = ignore,
    ) -> Tensor:
        """Run a step of at least one sequence.

        On the last stage `score` is given the logits of each sequence's `scored` rows; `embed` what
        the returned logits are made of, [samples, hidden], when a sequence `embeds`; `drawn` what
        `worker.sampler.Draw` makes of the logits, where the engine has done that as well.

        Returns:
            [tokens, hidden] for the next stage; on the last one, the logits [samples, vocabulary]
            of the sequences with `samples`, in order.

        Raises:
            ValueError: a sequence without tokens, or with too few blocks.
        """

    def close(self) -> None:
        """Free what the stage's model does not hold. Call once."""


@runtime_checkable
class TakesDrawn(Protocol):
    """An engine whose steps may take their tokens from where those of the last one were drawn."""

    def keep_drawn(self, drawn: Tensor) -> None:
        """Keep what was drawn last (`worker.sampler.Draw`), until the next step has been run."""


class TorchEngine:
    """Computes with torch, operation by operation, on any device.

    Args:
        stage: its weights are loaded.
        architecture: of the model.
        partition: of this rank.
        cache: its pool.
    """

    def __init__(
        self, stage: Stage, architecture: Architecture, partition: Partition, cache: KvCache
    ) -> None:
        stage.pack_weights()
        self._stage = stage
        self._architecture = architecture
        self._partition = partition
        self._cache = cache
        self._device = cache.pool.device
        self.hidden_dtype = cache.dtype
        kinds = [architecture.attention_kind(layer) for layer in partition.layers]
        self._kinds = list(dict.fromkeys(kinds))
        self._kind_of_layer = [self._kinds.index(kind) for kind in kinds]
        self._rotations = {
            kind.rope: Rotation(kind.rope, architecture.head_dim, self._device)
            for kind in self._kinds
            if kind.rope is not None
        }

    def run(
        self,
        batch: Sequence[SequenceInput],
        receive: Receive,
        score: TakeRows = ignore,
        embed: TakeRows = ignore,
        drawn: TakeRows = ignore,
    ) -> Tensor:
        packed = PackedStep(batch, self._cache.block_size)
        step = packed.to(self._device)
        self._cache.clear(step.fresh_blocks)
        return self._compute(step, receive(), score, embed)

    def _compute(
        self,
        step: StepBatch,
        hidden: Tensor | None,
        score: TakeRows = ignore,
        embed: TakeRows = ignore,
    ) -> Tensor:
        """The work on the device, of which a step consists once its numbers are there."""
        attention = [self._attention(step, kind) for kind in self._kinds]
        if hidden is None:
            hidden = self._stage.embed(step.token_ids, step.positions)
        hidden = self._run_layers(hidden, [attention[kind] for kind in self._kind_of_layer])
        if not self._partition.is_last_stage:
            return hidden
        scored, sampled = step.sample_rows[: step.scored], step.sample_rows[step.scored :]
        for rows in torch.split(scored, _SCORED_AT_ONCE) if step.scored else ():
            score(self._stage.logits(self._norm(hidden.index_select(0, rows))))
        if not sampled.shape[0]:
            return hidden.new_empty((0, self._architecture.vocab_size))
        normed = self._norm(hidden.index_select(0, sampled))
        embed(normed)
        return self._stage.logits(normed)

    def close(self) -> None:
        del self._stage, self._cache

    def _run_layers(self, hidden: Tensor, attention: Sequence[StepAttention]) -> Tensor:
        """[tokens, hidden] → [tokens, hidden], with the attention of each layer."""
        return self._stage.run_layers(hidden, attention)

    def _norm(self, hidden: Tensor) -> Tensor:
        """[samples, hidden] behind the last layer → what logits are made of."""
        return self._stage.norm(hidden)

    def _attention(self, step: StepBatch, kind: AttentionKind) -> StepAttention:
        """For all layers of a kind."""
        turned = None
        if kind.rope is not None:
            turned = self._rotations[kind.rope].at(step.positions, self.hidden_dtype)
        partition = self._partition
        return TorchAttention(
            step,
            self._cache,
            rotation=turned,
            group_size=len(partition.query_heads) // len(partition.kv_heads),
            num_kv_heads=len(partition.kv_heads),
            window=kind.window,
            softcap=self._architecture.attention_softcap,
        )
