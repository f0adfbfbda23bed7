"""Loads the weights of one rank, whichever format the model's directory has."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from fastserve_mega.models.architecture import Architecture
from fastserve_mega.system.config import ParallelConfig
from fastserve_mega.system.partition import Partition, partition_model
from fastserve_mega.system.pieces import Piece, Weight
from fastserve_mega.system.stored_tensors import find_tensor, has_fused_experts, has_safetensors
from fastserve_mega.system.weights import unused_positions, weights_of
from fastserve_mega.worker.megatron.distributed_checkpoint import (
    DistributedCheckpoint,
    find_distributed_checkpoint,
)
from fastserve_mega.worker.megatron.model import Stage
from fastserve_mega.worker.megatron.safetensors_files import SafetensorsFiles
from fastserve_mega.worker.megatron.scaled_weights import ScaledWeights

_CONSTANTS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Ends of names of tensors that follow from config.json: angles and masks."""
_OTHER_PARTS = ("vision_tower.", "multi_modal_projector.")
"""How names of what sees images begin; it is not loaded."""
_SCALES = (".weight_scale", ".weight_scale_inv", ".input_scale", ".k_scale", ".v_scale")
"""Ends of names of scales: a weight is read with its own, and what is multiplied or cached is
scaled as it is."""
_log = logging.getLogger(__name__)

Report = Callable[[int], None]
"""Called with the number of bytes of parameters that have been filled since the last call."""


class Checkpoint(Protocol):
    """The weights of a directory, found to be all there."""

    def load(self, stage: Stage, report: Report) -> None:
        """Fill all parameters of the stage; call once.

        Raises:
            ValueError: a tensor is missing or has another shape.
        """


def open_checkpoint(
    directory: Path, architecture: Architecture, partition: Partition
) -> Checkpoint:
    """Look at all headers and sizes, but load nothing yet.

    Raises:
        ValueError: a file or tensor is missing, cut short or has another shape; one sentence.
    """
    if not has_safetensors(directory) and (found := find_distributed_checkpoint(directory)):
        return DistributedCheckpoint(found, architecture, partition)
    return HuggingFaceCheckpoint(directory, architecture, partition)


def architecture_as_stored(directory: Path, architecture: Architecture) -> Architecture:
    """The architecture, with an output layer of its own where the checkpoint has one.

    A config.json may say that it is the embedding table, and be wrong: then the checkpoint counts,
    as in transformers.

    Raises:
        ValueError: a file is missing, cut short or malformed; one sentence.
    """
    if not architecture.tied_embeddings or not has_safetensors(directory):
        return architecture
    names = architecture.weights
    head, embedding = f"{names.head}.weight", f"{names.embedding}.weight"
    with SafetensorsFiles(directory) as files:
        known = names.prefix + embedding
        table = known if known in files else embedding
        if head not in files or table not in files or files.is_same(head, table):
            return architecture
    _log.warning(
        "config.json says tie_word_embeddings, but the checkpoint's %s is not its %s: it is used",
        head,
        table,
    )
    return replace(architecture, tied_embeddings=False)


class HuggingFaceCheckpoint:
    """Safetensors files with the names of transformers, of which each rank reads its part only.

    Raises:
        ValueError: see `open_checkpoint`.
    """

    def __init__(self, directory: Path, architecture: Architecture, partition: Partition) -> None:
        self._files = SafetensorsFiles(directory)
        self._scaled = ScaledWeights(self._files, architecture.weight_block)
        fused = has_fused_experts(self._files.tensors)
        self._weights = list(weights_of(architecture, partition, fused_experts=fused))
        for weight in self._weights:
            for piece in weight.pieces:
                self._find(piece)
        if partition.is_first_stage and partition.tensor_rank == 0:
            self._tell_what_is_not_used(architecture, fused_experts=fused)

    def _tell_what_is_not_used(self, architecture: Architecture, *, fused_experts: bool) -> None:
        """Warn of a config.json that may describe another model than the files hold."""
        whole = partition_model(architecture, ParallelConfig(), 0, 1)
        weights = [
            *weights_of(architecture, whole, fused_experts=fused_experts),
            *unused_positions(architecture),
        ]
        pieces = [piece for weight in weights for piece in weight.pieces]
        used = {name for piece in pieces for name in (piece.tensor, piece.bare_name)}
        used.add(f"{architecture.weights.head}.weight")  # a copy of the embedding table
        unused = [name for name in self._files if name not in used and not _is_constant(name)]
        if unused:
            _log.warning(
                "%d tensors of %s are not used, the first is %s: does config.json describe them?",
                len(unused),
                self._files.directory,
                min(unused),
            )

    def __enter__(self) -> HuggingFaceCheckpoint:
        self._files.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._files.__exit__(kind, error, trace)

    def load(self, stage: Stage, report: Report) -> None:
        parameters = stage.parameters()
        with self:
            for weight in self._weights:
                parameter = parameters.pop(weight.name)
                scales = parameters.pop(f"{weight.name}_scale", None)
                if scales is None:
                    self.fill(weight, parameter.detach())
                else:
                    self.fill_float8(weight, parameter.detach(), scales.detach())
                report(parameter.nbytes)
        if parameters:
            raise RuntimeError(f"no weights were loaded for {', '.join(sorted(parameters))}")

    def fill(self, weight: Weight, target: Tensor) -> None:
        """Read one parameter, converting to the dtype of `target` and moving to its device."""
        row = 0
        for piece in weight.pieces:
            part = target[row : row + len(piece.rows)]
            row += len(piece.rows)
            name = self._find(piece)
            if name is None:
                part.zero_()
            elif piece.columns is not None and piece.transposed:
                self._scaled.read(name, part.t(), piece.columns, piece.rows)
            else:
                self._scaled.read(name, part, piece.rows, piece.columns)
        target[row:].zero_()

    def fill_float8(self, weight: Weight, values: Tensor, scales: Tensor) -> None:
        """Read the weight of a linear as values in 8 bits and scales of its rows."""
        row = 0
        for piece in weight.pieces:
            part = slice(row, row + len(piece.rows))
            row = part.stop
            assert piece.columns is not None
            name = self._find(piece) or piece.tensor
            self._scaled.read_float8(
                name,
                (values[part], scales[part]),
                piece.rows,
                piece.columns,
                transposed=piece.transposed,
            )

    def dtype(self, weight: Weight) -> torch.dtype:
        """The dtype of a parameter in the files; of what is in 8 bits, the one to widen it to."""
        names = (self._find(piece) for piece in weight.pieces)
        found = next((self._files.dtype(name) for name in names if name), torch.float32)
        return torch.bfloat16 if found == torch.float8_e4m3fn else found

    def _find(self, piece: Piece) -> str | None:
        """The tensor's name in the files, None for an optional one that is not there."""
        name = find_tensor(self._files.tensors, piece, self._files.directory)
        if name is not None:
            self._scaled.check(name)
        return name


def _is_constant(name: str) -> bool:
    is_other_part = name.removeprefix("model.").startswith(_OTHER_PARTS)
    return is_other_part or name.endswith((*_CONSTANTS, *_SCALES))
