"""Steps that only decode, recorded as CUDA graphs, so that starting their kernels costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastserve_mega.worker.megatron.engine import Receive
from fastserve_mega.worker.model_runner import SequenceInput
from fastserve_mega.worker.sampler import RULES, Draw, rules_of
from fastserve_mega.worker.step_batch import PackedStep, StepBatch, StepShape
from fastserve_mega.worker.transfer import copy_to_device

LONGEST_CONTEXT = 16_384
"""Tokens up to which a step is recorded: its block tables have room for them, and into how many
parts contexts are split is chosen for them."""
_FINE, _COARSE = 8, 16
"""Between numbers of sequences that are recorded, up to 64 and beyond."""

Compute = Callable[[StepBatch, Tensor | None], Tensor]
"""Does the work of a step on the device, with what the stage before hands over."""
Results = tuple[Tensor, Tensor | None]
"""What a step computes, and what was drawn of it where that is logits."""


def keep(_: Tensor) -> None:
    """For steps whose tokens the host knows."""


class Recorder(Protocol):
    """Makes what computes from fixed buffers into something that can be computed again."""

    def record(self, compute: Callable[[], Results]) -> Callable[[], Results]:
        """Returns what does the same on the same memory, and gives the same tensors."""


class CudaRecorder:
    """Records CUDA graphs that share their memory: one runs at a time.

    All on one stream: cuBLAS takes 32 MiB for each stream that it has seen, and keeps them.
    """

    def __init__(self) -> None:
        self._pool: Any = None
        self._aside = torch.cuda.Stream()  # type: ignore[no-untyped-call] # torch

    def record(self, compute: Callable[[], Results]) -> Callable[[], Results]:
        current, aside = torch.cuda.current_stream(), self._aside
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            compute()  # kernels are compiled and workspaces taken, which cannot be recorded
        current.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog asks for its events meanwhile, in a thread of its own.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=aside, capture_error_mode="thread_local"
        ):
            result = compute()
        self._pool = graph.pool()

        def replay() -> Results:
            graph.replay()
            return result

        return replay


@dataclass(frozen=True, slots=True)
class _Recorded:
    shape: StepShape
    numbers: Tensor
    """On the device: the step's array (`PackedStep`), with the bits of `rules_of` in it."""
    hidden: Tensor | None
    replay: Callable[[], Results]


class DecodeGraphs:
    """Recorded steps for some numbers of sequences; a step takes the next larger one.

    Args:
        compute: reads nothing but its arguments, weights and the cache, and does the same
            operations for all steps of a shape.
        block_size: tokens in a block.
        device: of the tensors.
        hidden: size and type of what the stage before hands over; None on the first stage.
        recorder: of this kind of device.
        draw: chooses tokens, where what is computed is logits and they are chosen on this rank.
    """

    def __init__(
        self,
        compute: Compute,
        *,
        block_size: int,
        device: torch.device,
        hidden: tuple[int, torch.dtype] | None,
        recorder: Recorder,
        draw: Draw | None = None,
    ) -> None:
        self._compute = compute
        self._block_size = block_size
        self._device = device
        self._hidden = hidden
        self._recorder = recorder
        self._draw = draw
        self._recorded: list[_Recorded] = []
        self._result: Tensor | None = None
        """What the largest step computes. The others leave theirs in its first rows: logits that
        each of them kept would take a gigabyte together."""

    def record(self, max_sequences: int, max_context: int) -> int:
        """Record steps of up to so many sequences and tokens of each; returns how many."""
        blocks = -(-min(max_context, LONGEST_CONTEXT) // self._block_size)
        # The largest first: the others find room in its memory.
        for count in reversed(recorded_sizes(max_sequences)):
            self._recorded.append(self._record(StepShape.of_decodes(count, blocks)))
        self._recorded.reverse()
        return len(self._recorded)

    def run(
        self,
        batch: Sequence[SequenceInput],
        receive: Receive,
        complete: Callable[[Tensor], None] = keep,
    ) -> Results | None:
        """Run a step; None, without having done anything, where none that fits is recorded.

        Args:
            batch: its sequences.
            receive: gives what the stage before hands over.
            complete: puts the tokens on the device, [sequences], in the place of what stands there.
        """
        # A recorded step hands out nothing but logits and tokens.
        if not all(len(s.token_ids) == 1 and s.samples and not s.embeds for s in batch):
            return None
        recorded = next((r for r in self._recorded if r.shape.sequences >= len(batch)), None)
        longest = max(each.context for each in batch)
        if recorded is None or longest > recorded.shape.blocks * self._block_size:
            return None
        packed = PackedStep(
            batch, self._block_size, recorded.shape, self._num_rules(recorded.shape)
        )
        if self._draw is not None:
            rules = packed.rules.view(np.float64).reshape(RULES, -1)
            rules[:, : len(batch)] = rules_of(batch)
        filled = packed.filled
        copy_to_device(torch.from_numpy(packed.numbers[:filled]), recorded.numbers[:filled])
        complete(recorded.numbers[: len(batch)])
        if recorded.hidden is not None:
            received = receive()
            assert received is not None
            recorded.hidden[: len(batch)].copy_(received)
        result, drawn = recorded.replay()
        return result[: len(batch)], None if drawn is None else drawn[: len(batch)]

    def _num_rules(self, shape: StepShape) -> int:
        return 0 if self._draw is None else RULES * shape.samples

    def _record(self, shape: StepShape) -> _Recorded:
        packed = PackedStep([], self._block_size, shape, self._num_rules(shape))
        numbers = torch.from_numpy(packed.numbers).to(self._device)
        step = packed.on(numbers)
        first = sum(shape.sizes)
        rules = numbers[first : first + len(packed.rules)].view(torch.float64)
        hidden = None
        if self._hidden is not None:
            width, dtype = self._hidden
            hidden = torch.zeros((shape.rows, width), dtype=dtype, device=self._device)
        is_largest = not self._recorded

        def compute() -> Results:
            result = self._compute(step, hidden)
            drawn = None if self._draw is None else self._draw(result, rules.view(RULES, -1))
            if is_largest or self._result is None:
                self._result = result
                return result, drawn
            return self._result[: shape.sequences].copy_(result), drawn

        replay = self._recorder.record(compute)
        return _Recorded(shape, numbers, hidden, replay)


def recorded_sizes(most: int) -> list[int]:
    """Numbers of sequences, ascending, of which the last is `most`."""
    sizes = {1, 2, 4, *range(_FINE, 65, _FINE), *range(64, most, _COARSE), most}
    return sorted(size for size in sizes if size <= most)
