"""A stage of the C++ library, with torch's tensors."""

from __future__ import annotations

import ctypes

import torch
import torch.distributed as dist
from torch import Tensor

from fastserve_mega.worker.model_runner import Ask, Verdict
from fastserve_mega.worker.native.library import (
    AskFunction,
    GatherFunction,
    Library,
    MatrixName,
    StageConfig,
    VectorName,
)
from fastserve_mega.worker.native.step import StepArrays

_PANEL = 32
"""Rows of a matrix that are laid out together; the last ones are filled up with zeros."""
_ABANDONED = 1


_BYTE_GROUP = 64
"""Inputs of an output with 8-bit weights that share a scale in float32."""


def packed_bytes(rows: int, columns: int, itemsize: int, *, has_byte_weights: bool) -> int:
    """Memory of a packed matrix, or at most that."""
    row_bytes = columns * itemsize
    if has_byte_weights:
        row_bytes = -(-columns // _BYTE_GROUP) * (_BYTE_GROUP + 4)
    return (-(-rows // _PANEL) + 1) * _PANEL * row_bytes


class NativeStage:
    """Weights, buffers and threads of one stage.

    Args:
        library: loaded.
        config: sizes; `pool` must be memory that outlives the stage.
        group: of the ranks that share its layers.

    Raises:
        MemoryError: there is too little memory, or a thread cannot be started.
    """

    def __init__(self, library: Library, config: StageConfig, group: dist.ProcessGroup) -> None:
        self._library = library
        self._config = config
        self._group = group
        self._failure: BaseException | None = None
        config.gather = GatherFunction(self._gather)
        self._ask: Ask | None = None
        self._was_abandoned = False
        self._ask_function = AskFunction(self._asked)
        self._kept: list[Tensor] = []
        self._handle = library.create(ctypes.byref(config))
        if not self._handle:
            raise MemoryError(f"{config.weight_bytes / 2**30:.2f} GiB of weights, or a thread")

    def set_matrix(self, layer: int, name: MatrixName, weight: Tensor) -> None:
        """Lay out a copy of a weight [outputs, inputs]."""
        weight = weight.detach().contiguous()
        rows, columns = weight.shape
        self._check(
            self._library.set_matrix(self._handle, layer, name, weight.data_ptr(), rows, columns)
        )

    def set_vector(self, layer: int, name: int, vector: Tensor) -> None:
        """Copy a norm's weight, what follows it, or a bias; see `VectorName`."""
        values = vector.detach().float().contiguous()
        self._check(
            self._library.set_vector(self._handle, layer, name, values.data_ptr(), len(values))
        )

    def set_norm(self, layer: int, name: VectorName, weight: Tensor, bias: Tensor | None) -> None:
        """Copy a norm's weight and bias."""
        self.set_vector(layer, name, weight)
        if bias is not None:
            self.set_vector(layer, name + 1, bias)

    def set_attention(self, layer: int, rope: int | None, window: int | None) -> None:
        """Say how a layer treats positions; `rope` is a number of `set_rope`."""
        self._library.set_attention(
            self._handle, layer, -1 if rope is None else rope, 0 if window is None else window
        )

    def set_rope(self, number: int, frequencies: Tensor, factor: float) -> None:
        """Set a rotation: radians per position of each pair, and what all is multiplied by."""
        pairs = len(frequencies)
        self._library.set_rope(self._handle, number, self._keep(frequencies), pairs, factor)

    def set_tables(self, tokens: Tensor | None, positions: Tensor | None) -> None:
        """Set the embeddings' rows; without `tokens`, they are those of the output matrix."""
        self._library.set_tables(
            self._handle,
            None if tokens is None else self._keep(tokens),
            None if positions is None else self._keep(positions),
        )

    def run(self, step: StepArrays, hidden: Tensor | None, normed: Tensor | None = None) -> Tensor:
        """Run a step.

        Args:
            step: laid out.
            hidden: [tokens, hidden] in float32, on all but the first stage.
            normed: [samples, hidden] in float32 is filled with what logits are made of, on the
                last stage; None is not.

        Returns:
            `hidden` for the next stage; on the last, the logits [samples, vocabulary] of the part
            of the vocabulary that this rank has.

        Raises:
            MemoryError: there is too little memory.
            RuntimeError: a rank that shares the layers does not take part.
        """
        config = self._config
        if config.last:
            result = torch.empty((step.samples, config.vocabulary), dtype=torch.float32)
            step.input.logits = result.data_ptr()
        else:
            result = torch.empty((step.tokens, config.hidden), dtype=torch.float32)
            step.input.hidden_out = result.data_ptr()
        step.input.normed = None if normed is None else normed.data_ptr()
        step.input.hidden_in = None if hidden is None else hidden.data_ptr()
        self._step(step)
        return result

    def run_ahead(self, step: StepArrays, ask: Ask) -> Tensor | None:
        """Run a step of the only stage that `ask`, called once a layer, may end: then None."""
        self._ask = ask
        step.input.ask = self._ask_function
        logits = self.run(step, None)
        return None if self._was_abandoned else logits

    def close(self) -> None:
        """End the threads and free all memory. Call once."""
        self._library.destroy(self._handle)
        self._handle = None

    def _step(self, step: StepArrays) -> None:
        status = self._library.step(self._handle, ctypes.byref(step.input))
        if self._failure is not None:
            raise self._failure
        self._was_abandoned = status == _ABANDONED
        if not self._was_abandoned:
            self._check(status)

    def _gather(self, own: int, everywhere: int, count: int) -> int:
        """Called within a step, on its thread; an exception cannot pass through C++."""
        try:
            parts = _floats(everywhere, count * self._config.ranks).chunk(self._config.ranks)
            dist.all_gather(list(parts), _floats(own, count), group=self._group)
        except Exception as error:
            self._failure = error
            return 1
        return 0

    def _asked(self) -> int:
        """Called within a step, on its thread, as `_gather` is."""
        try:
            return self._ask() if self._ask else Verdict.GO_ON
        except BaseException as error:
            self._failure = error
            return Verdict.ABANDON

    def _keep(self, tensor: Tensor) -> int:
        kept = tensor.detach().contiguous()
        self._kept.append(kept)
        return kept.data_ptr()

    def _check(self, status: int) -> None:
        if status:
            raise MemoryError("buffers of the native step")


def _floats(address: int, count: int) -> Tensor:
    return torch.frombuffer((ctypes.c_float * count).from_address(address), dtype=torch.float32)
