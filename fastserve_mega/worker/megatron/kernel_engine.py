"""Computes a stage with the kernels of worker.kernels, which must be importable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastserve_mega.models.architecture import Architecture, AttentionKind
from fastserve_mega.system.partition import Partition
from fastserve_mega.worker.kernels.attention import attend
from fastserve_mega.worker.kernels.pages import HeadNorm, Pages, Turns, rotate_and_write
from fastserve_mega.worker.kv_cache import KvCache
from fastserve_mega.worker.megatron.attention import StepAttention
from fastserve_mega.worker.megatron.decode_graphs import DecodeGraphs, Recorder, keep
from fastserve_mega.worker.megatron.engine import Receive, TakeRows, TorchEngine, ignore
from fastserve_mega.worker.megatron.kernel_layers import KernelLayer, norm_of, run_kernel_layers
from fastserve_mega.worker.megatron.model import Stage
from fastserve_mega.worker.model_runner import SequenceInput
from fastserve_mega.worker.sampler import Draw
from fastserve_mega.worker.step_batch import PackedStep, StepBatch


class KernelAttention:
    """Attention of a step, for all layers of a kind, by kernels.

    Args:
        step: the batch.
        pages: of the cache.
        turns: None where nothing is rotated.
        window: a token attends to this many tokens at most; None is no limit.
        softcap: scores stay between minus and plus this; None is no limit.
    """

    def __init__(
        self,
        step: StepBatch,
        pages: Pages,
        *,
        turns: Turns | None,
        window: int | None,
        softcap: float | None,
    ) -> None:
        self._step = step
        self._pages = pages
        self._turns = turns
        self._window = window
        self._softcap = softcap

    def attend(
        self,
        layer: int,
        qkv: Tensor,
        scale: float,
        norm: HeadNorm | None = None,
        *,
        is_scaled: bool = False,
    ) -> Any:
        """As StepAttention; with `norm`, queries and keys are normed first.

        Returns:
            `Rows`, in 8 bits if `is_scaled`.
        """
        step = self._step
        rotate_and_write(
            qkv, self._pages, layer, step.slots, step.positions, turns=self._turns, norm=norm
        )
        return attend(
            qkv,
            self._pages,
            layer,
            step,
            scale=scale,
            window=self._window,
            softcap=self._softcap,
            is_scaled=is_scaled,
        )


class KernelEngine(TorchEngine):
    """Computes with torch's matrix products and kernels of our own for all else.

    Args:
        stage: its weights are loaded, its layers are Megatron's own.
        architecture: of the model.
        partition: of this rank.
        cache: its pool.
    """

    def __init__(
        self, stage: Stage, architecture: Architecture, partition: Partition, cache: KvCache
    ) -> None:
        super().__init__(stage, architecture, partition, cache)
        self._pages = Pages.of(cache)
        self._layers = [KernelLayer(layer, architecture.activation) for layer in stage.layers]
        self._final_norm = (
            norm_of(stage.model.decoder.final_layernorm) if partition.is_last_stage else None
        )
        self._graphs: DecodeGraphs | None = None
        self._drawn: Tensor | None = None
        self._turns = {
            rope: Turns(rotation.frequencies, rotation.factor)
            for rope, rotation in self._rotations.items()
        }

    def record_graphs(
        self, max_sequences: int, max_context: int, recorder: Recorder, draw: Draw | None = None
    ) -> int:
        """Record steps that only decode; returns how many. All ranks call it alike.

        Args:
            max_sequences: of a step.
            max_context: tokens of a sequence.
            recorder: of this kind of device.
            draw: chooses tokens, which is recorded as well on the rank that samples.
        """
        samples = self._partition.is_last_stage and self._partition.tensor_rank == 0
        is_first = self._partition.is_first_stage
        self._graphs = DecodeGraphs(
            self._compute,
            block_size=self._cache.block_size,
            device=self._device,
            hidden=None if is_first else (self._architecture.hidden_size, self.hidden_dtype),
            recorder=recorder,
            draw=draw if samples else None,
        )
        return self._graphs.record(max_sequences, max_context)

    def keep_drawn(self, drawn: Tensor) -> None:
        self._drawn = drawn

    def run(
        self,
        batch: Sequence[SequenceInput],
        receive: Receive,
        score: TakeRows = ignore,
        embed: TakeRows = ignore,
        drawn: TakeRows = ignore,
    ) -> Tensor:
        takes_drawn = batch[0].token_ids[0] < 0
        # In a recorded step each token is sampled, so there is none to score.
        if (
            self._graphs is not None
            and (
                done := self._graphs.run(batch, receive, self._take_drawn if takes_drawn else keep)
            )
            is not None
        ):
            result, tokens = done
            if tokens is not None:
                drawn(tokens)
            # Recorded steps share their memory: the next one would overwrite what is on its way.
            return result if self._partition.is_last_stage else result.clone()
        # No block is cleared: the kernels do not look at what has not been written.
        step = PackedStep(batch, self._cache.block_size).to(self._device)
        if takes_drawn:
            self._take_drawn(step.token_ids)
        return self._compute(step, receive(), score, embed)

    def _take_drawn(self, token_ids: Tensor) -> None:
        """Put tokens in the place of -1 - the rows for which they were drawn."""
        assert self._drawn is not None
        token_ids.copy_(self._drawn[:, 0].index_select(0, -1 - token_ids))

    def close(self) -> None:
        self._graphs = None  # it holds this engine
        super().close()
        del self._layers, self._pages

    def _run_layers(self, hidden: Tensor, attention: Sequence[StepAttention]) -> Tensor:
        return run_kernel_layers(self._layers, hidden, attention, self._final_norm)

    def _norm(self, hidden: Tensor) -> Tensor:
        return hidden  # normed with the last layer

    def _attention(self, step: StepBatch, kind: AttentionKind) -> StepAttention:
        return KernelAttention(
            step,
            self._pages,
            turns=None if kind.rope is None else self._turns[kind.rope],
            window=kind.window,
            softcap=self._architecture.attention_softcap,
        )
