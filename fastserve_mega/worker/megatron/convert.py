"""`fastserve-mega convert`: between Hugging Face's and Megatron's formats, on one CPU.

No more than one layer of the model is in memory.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from fastserve_mega.models.architecture import Architecture, load_architecture
from fastserve_mega.models.fields import read_json
from fastserve_mega.system.config import ParallelConfig
from fastserve_mega.system.partition import Partition, partition_model
from fastserve_mega.system.pieces import Weight
from fastserve_mega.system.stored_tensors import INDEX_FILE, has_safetensors
from fastserve_mega.system.weights import unused_positions, weights_of
from fastserve_mega.worker.loading_progress import show_progress
from fastserve_mega.worker.megatron.checkpoint import HuggingFaceCheckpoint, architecture_as_stored
from fastserve_mega.worker.megatron.distributed_checkpoint import (
    FORMAT_FILE,
    DistributedCheckpoint,
    find_distributed_checkpoint,
    read_tensors,
    sharded_tensors,
)
from fastserve_mega.worker.megatron.distributed_saving import save_tensors
from fastserve_mega.worker.megatron.initialize import join_process_groups
from fastserve_mega.worker.megatron.layer_spec import choose_layers
from fastserve_mega.worker.megatron.model import build_stage
from fastserve_mega.worker.megatron.safetensors_files import TensorInfo, write_safetensors
from fastserve_mega.worker.topology import Topology

Format = Literal["huggingface", "torch_dist"]

_COPIED = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
"""Endings of what describes a model and its tokenizer."""
_NOT_COPIED = {INDEX_FILE, FORMAT_FILE}


def convert(source: Path, target: Path, output_format: Format) -> None:
    """Write a model directory anew in the other format.

    Args:
        source: with config.json, and weights in either format.
        target: empty, or not there yet.
        output_format: of the weights in `target`.

    Raises:
        ValueError: the source is not usable or has the format already, or the target has files.
        OSError: a file cannot be read or written.
    """
    architecture = load_architecture(source)
    if architecture_as_stored(source, architecture) != architecture:
        raise ValueError(
            f"{source} has an output layer of its own, which would be lost; write "
            f'"tie_word_embeddings": false in its config.json first'
        )
    found = None if has_safetensors(source) else find_distributed_checkpoint(source)
    if (found is not None) == (output_format == "torch_dist"):
        raise ValueError(f"{source} has the format {output_format} already")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty directory")
    partition = partition_model(architecture, ParallelConfig(), 0, 1)
    weights = [*weights_of(architecture, partition), *unused_positions(architecture)]
    if found is None:
        reader = HuggingFaceCheckpoint(source, architecture, partition)
        with _whole_model(architecture, partition, weights) as parts:
            _write_distributed(target, reader, weights, parts)
    else:
        checkpoint = DistributedCheckpoint(found, architecture, partition)
        stored = checkpoint.metadata.state_dict_metadata
        weights = [weight for weight in weights if not weight.extra or weight.name in stored]
        with _whole_model(architecture, partition, weights, stored) as parts:
            checkpoint.check([part for some in parts.values() for part in some])
            target.mkdir(parents=True, exist_ok=True)
            _Tensors(found, checkpoint, weights, parts).write(target)
    _copy_description(source, target)


@contextmanager
def _whole_model(
    architecture: Architecture,
    partition: Partition,
    weights: Iterable[Weight],
    stored_names: Any = None,
) -> Iterator[dict[str, list[Any]]]:
    """Megatron's own description of the parameters, which take no memory.

    Yields:
        ShardedTensors that make up each parameter, with data on the meta device.
    """
    groups = join_process_groups(
        ParallelConfig(device="cpu"), Topology(), torch.device("cpu"), "", 0
    )
    try:
        device = torch.device("meta")
        choice = choose_layers("local", architecture, device)
        stage = build_stage(
            architecture, partition, groups, choice, dtype=torch.float32, device=device
        )
        parts: dict[str, list[Any]] = {}
        for name, tensor in sharded_tensors(stage, architecture, partition, stored_names):
            parts.setdefault(name, []).append(tensor)
        for weight in weights:
            if weight.extra:
                data = torch.empty(weight.shape, device=device)
                parts[weight.name] = [ShardedTensor.from_rank_offsets(weight.name, data)]
        yield parts
    finally:
        dist.destroy_process_group()


def _with_data(part: Any, whole: Tensor) -> Any:
    """The part with the values that it has in the whole parameter."""
    start = part.data.storage_offset()
    data = whole.view(-1)[start : start + part.data.numel()].view(part.local_shape)
    return dataclasses.replace(part, data=data, dtype=data.dtype)


def _write_distributed(
    target: Path,
    reader: HuggingFaceCheckpoint,
    weights: Sequence[Weight],
    parts: dict[str, list[Any]],
) -> None:
    described, origin = [], {}
    for weight in weights:
        dtype = reader.dtype(weight)
        for part in parts[weight.name]:
            data = torch.empty(part.local_shape, dtype=dtype, device="meta")
            described.append(dataclasses.replace(part, data=data, dtype=dtype))
            origin[part.key, part.global_offset] = (weight, part)
    total = sum(part.data.nbytes for part in described)
    last: tuple[Weight | None, Tensor] = (None, torch.empty(0))
    with show_progress(f"converting to {target.name}", total) as report:

        def fill(key: str, offset: tuple[int, ...]) -> Tensor:
            nonlocal last
            weight, part = origin[key, offset]
            if last[0] is not weight:
                whole = torch.empty(weight.shape, dtype=reader.dtype(weight))
                reader.fill(weight, whole)
                last = (weight, whole)
            data: Tensor = _with_data(part, last[1]).data
            report(data.nbytes)
            return data

        with reader:
            save_tensors(target, described, fill)


class _Tensors:
    """Hugging Face's tensors, put together from a distributed checkpoint layer by layer."""

    def __init__(
        self,
        directory: Path,
        checkpoint: DistributedCheckpoint,
        weights: Sequence[Weight],
        parts: dict[str, list[Any]],
    ) -> None:
        self._directory = directory
        self._checkpoint = checkpoint
        self._weights = weights
        self._parts = parts

    def write(self, target: Path) -> None:
        left_out = self._zero_biases()
        infos = {
            piece.tensor: TensorInfo(piece.shape, self._dtype(weight))
            for _, weights in self._groups()
            for weight in weights
            for piece in weight.pieces
            if piece.tensor not in left_out
        }
        total = sum(info.num_bytes for info in infos.values())
        with show_progress(f"converting to {target.name}", total) as report:
            tensors = (pair for pair in self._tensors(report) if pair[0] not in left_out)
            write_safetensors(target, infos, tensors)

    def _groups(self) -> Iterator[tuple[str, list[Weight]]]:
        """The embeddings, each layer, the end: what shares tensors is in one group."""
        grouped = itertools.groupby(
            sorted(self._weights, key=lambda weight: not weight.name.startswith("embedding.")),
            key=lambda weight: re.sub(r"^(embedding|decoder\.layers\.\d+)\..*", r"\1", weight.name),
        )
        return ((name, list(weights)) for name, weights in grouped)

    def _tensors(self, report: Callable[[int], None]) -> Iterator[tuple[str, Tensor]]:
        for _, weights in self._groups():
            tensors: dict[str, Tensor] = {}
            for weight, values in self._read(weights):
                row = 0
                for piece in weight.pieces:
                    part = values[row : row + len(piece.rows)]
                    row += len(piece.rows)
                    if piece.tensor not in tensors:
                        tensors[piece.tensor] = torch.zeros(piece.shape, dtype=values.dtype)
                    whole = tensors[piece.tensor]
                    whole = whole.t() if piece.transposed else whole
                    whole[piece.rows.start : piece.rows.stop].copy_(part)
            for name, tensor in tensors.items():
                yield name, tensor
                report(tensor.nbytes)

    def _read(self, weights: Sequence[Weight]) -> list[tuple[Weight, Tensor]]:
        values = [
            (weight, torch.empty(weight.shape, dtype=self._dtype(weight))) for weight in weights
        ]
        read_tensors(
            self._directory,
            [_with_data(part, whole) for w, whole in values for part in self._parts[w.name]],
        )
        return values

    def _dtype(self, weight: Weight) -> torch.dtype:
        stored = self._checkpoint.metadata.state_dict_metadata[self._parts[weight.name][0].key]
        dtype: torch.dtype = stored.properties.dtype  # type: ignore[union-attr] # checked
        return dtype

    def _zero_biases(self) -> set[str]:
        """Tensors that the family may lack, and that are zero in all layers.

        Megatron has all biases of a kind or none, so some may be there for its sake only.
        """
        optional = [w for w in self._weights if any(piece.optional for piece in w.pieces)]
        by_kind: dict[str, list[tuple[str, bool]]] = {}
        for weight, values in self._read(optional) if optional else ():
            row = 0
            for piece in weight.pieces:
                is_zero = not values[row : row + len(piece.rows)].any()
                row += len(piece.rows)
                kind = re.sub(r"\d+", "*", piece.tensor)
                by_kind.setdefault(kind, []).append((piece.tensor, is_zero))
        zero_kinds = (found for found in by_kind.values() if all(is_zero for _, is_zero in found))
        return {name for found in zero_kinds for name, _ in found}


def _copy_description(source: Path, target: Path) -> None:
    """config.json last: only with it is the target a model directory."""
    files = [path for path in source.iterdir() if path.is_file() and path.suffix in _COPIED]
    for path in sorted(files, key=lambda path: path.name == "config.json"):
        if path.name not in _NOT_COPIED:
            shutil.copyfile(path, target / path.name)
    description = read_json(source / "config.json") or {}
    if description.pop("quantization_config", None) is not None:
        (target / "config.json").write_text(json.dumps(description, indent=2))
