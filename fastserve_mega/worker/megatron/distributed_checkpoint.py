"""Megatron's distributed checkpoints (`torch_dist`), cut anew for whatever ranks there are."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from fastserve_mega.models.architecture import Architecture
from fastserve_mega.system.partition import Partition
from fastserve_mega.worker.megatron.metadata_names import check_names
from fastserve_mega.worker.megatron.model import Stage

FORMAT_FILE = "metadata.json"
"""Says which format the directory has."""
TENSORS_FILE = ".metadata"
"""Says where each tensor lies."""
_LATEST_FILE = "latest_checkpointed_iteration.txt"
_ROUNDS = 8
"""Parts in which a checkpoint is loaded, for the progress to be seen. The ranks read in lockstep,
so all must have the same number."""

_EMBEDDING = "embedding.word_embeddings.weight"
_HEAD = "output_layer.weight"
_LAYERS = "decoder.layers."
_FIRST_LAYER = f"{_LAYERS}0."


def find_distributed_checkpoint(directory: Path) -> Path | None:
    """The directory itself, or the latest iteration in a directory that Megatron-LM wrote."""
    latest = directory / _LATEST_FILE
    if latest.is_file():
        word = latest.read_text(encoding="utf-8").strip()
        directory = directory / (f"iter_{int(word):07d}" if word.isdecimal() else word)
    return directory if (directory / FORMAT_FILE).is_file() else None


class DistributedCheckpoint:
    """The weights of a GPTModel as Megatron saves them.

    Raises:
        ValueError: a file is missing, cut short or of another format; one sentence names it.
    """

    def __init__(self, directory: Path, architecture: Architecture, partition: Partition) -> None:
        _check_format(directory)
        self._directory = directory
        self._architecture = architecture
        self._partition = partition
        self.metadata = _read_metadata(directory)
        _check_files(directory, self.metadata)

    def load(self, stage: Stage, report: Callable[[int], None]) -> None:
        if any(each.dtype == torch.float8_e4m3fn for each in stage.parameters().values()):
            raise ValueError(
                f"model.quantization=fp8 needs Hugging Face's format, and {self._directory} has "
                "Megatron's; fastserve-mega convert makes one of the other"
            )
        names = self.metadata.state_dict_metadata
        tensors = [
            tensor
            for _, tensor in sharded_tensors(stage, self._architecture, self._partition, names)
        ]
        self.check(tensors)
        for tensor_list in _rounds(tensors, _ROUNDS):
            read_tensors(self._directory, tensor_list)
            report(sum(tensor.data.nbytes for tensor in tensor_list))

    def check(self, tensors: Sequence[Any]) -> None:
        """Compare with what is to be loaded.

        Raises:
            ValueError: a tensor is missing or has another shape.
        """
        for tensor in tensors:
            stored = self.metadata.state_dict_metadata.get(tensor.key)
            if not isinstance(stored, TensorStorageMetadata):
                raise ValueError(f"the checkpoint {self._directory} has no tensor {tensor.key}")
            wanted, shape = tuple(tensor.global_shape), tuple(stored.size)
            if tensor.allow_shape_mismatch:
                # Its padding is that of the ranks that saved it.
                vocab_size = self._architecture.vocab_size
                if shape[0] >= vocab_size and shape[1:] == wanted[1:]:
                    continue
                wanted = (vocab_size, *wanted[1:])
            if shape != wanted:
                raise ValueError(
                    f"the checkpoint's {tensor.key} has shape {shape}, config.json implies {wanted}"
                )


@contextmanager
def one_sentence(directory: Path) -> Iterator[None]:
    """Raise ValueError where torch raises an exception of its own, which is not an `Exception`."""
    try:
        yield
    except CheckpointException as error:
        reasons = [str(reason[0]) or type(reason[0]).__name__ for reason in error.failures.values()]
        line = reasons[0].splitlines()[0] if reasons else "unknown reason"
        raise ValueError(f"the checkpoint {directory} fails: {line}") from None


def read_tensors(directory: Path, tensors: Sequence[Any]) -> None:
    """Fill the data of sharded tensors; all ranks call it together.

    Raises:
        ValueError: a file is damaged, on whichever rank it was found.
    """
    with one_sentence(directory), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron calls deprecated functions of torch
        # Not dist_checkpointing.load, which unpickles what else a trainer has left there.
        TorchDistLoadShardedStrategy().load(
            {str(number): tensor for number, tensor in enumerate(tensors)}, directory
        )


def sharded_tensors(
    stage: Stage,
    architecture: Architecture,
    partition: Partition,
    stored_names: Mapping[str, Any] | None = None,
) -> Iterator[tuple[str, Any]]:
    """The parameters of a stage as parts of the whole model's tensors, which share their memory.

    To Megatron each stage is a model of its own; here its layers get their global numbers.

    Args:
        stage: of this rank.
        architecture: of the model.
        partition: of this rank.
        stored_names: of a checkpoint to load, which may have been saved with other options.

    Yields:
        The parameter's name, and a ShardedTensor of it or of a part of its rows.
    """
    stored = stored_names or {}
    metadata = {
        "dp_cp_group": stage.groups.megatron.dp,
        "non_homogeneous_layers": (
            any(name.startswith(_FIRST_LAYER) for name in stored)
            if stored
            # One tensor for the same parameter of all layers cannot have holes.
            else architecture.experts is not None and bool(architecture.experts.dense_layers)
        ),
        "singleton_local_shards": any(name.endswith("linear_fc1.weight_w") for name in stored),
    }
    state = stage.model.sharded_state_dict(metadata=metadata)
    for name, entry in state.items():
        for tensor in _parts(entry):
            for part in _split_replicated(tensor, architecture, partition):
                yield name, _make_global(part, architecture, partition)


def _parts(entry: Any) -> list[Any]:
    """Gate and up projection are two parts; what is no tensor is of no use here."""
    if isinstance(entry, ShardedTensorFactory):
        built = entry.build()
        return list(built.values() if isinstance(built, dict) else built)
    return [entry] if isinstance(entry, ShardedTensor) else []


def _make_global(tensor: Any, architecture: Architecture, partition: Partition) -> Any:
    first = partition.layers.start
    key, shape, offset = tensor.key, tensor.global_shape, tensor.global_offset
    data, replica = tensor.data.detach(), tensor.replica_id
    # Axes of the whole tensor that the parameter lacks: its layer, its expert.
    data = data.view((1,) * tensor.prepend_axis_num + tuple(data.shape))
    number, _, rest = key.removeprefix(_LAYERS).partition(".")
    if key.startswith(_LAYERS) and number.isdecimal():
        key = f"{_LAYERS}{int(number) + first}.{rest}"
    elif key.startswith(_LAYERS):
        shape, offset = (architecture.num_layers, *shape[1:]), (offset[0] + first, *offset[1:])
    elif key == _HEAD and architecture.tied_embeddings:
        key, replica = _EMBEDDING, (1, *replica[1:])  # the last stage's copy
    return dataclasses.replace(
        tensor,
        key=key,
        data=data,
        local_shape=tuple(data.shape),
        global_shape=tuple(shape),
        global_offset=tuple(offset),
        prepend_axis_num=0,
        axis_fragmentations=None,  # stages may have unequal numbers of layers
        replica_id=replica,
    )


def _split_replicated(tensor: Any, architecture: Architecture, partition: Partition) -> list[Any]:
    """Where ranks hold copies of a key-value head: query, key and value rows one by one."""
    kv_heads = architecture.num_kv_heads
    if kv_heads >= partition.tensor_size or ".linear_qkv." not in tensor.key:
        return [tensor]
    if tensor.key.endswith(("layer_norm_weight", "layer_norm_bias")):
        return [tensor]
    axis, head_dim = tensor.prepend_axis_num, architecture.head_dim
    group = architecture.num_heads // kv_heads
    (kv_head,) = partition.kv_heads
    queries = partition.query_heads
    start = kv_head * (group + 2)
    heads = [start + queries.start - kv_head * group, start + group, start + group + 1]
    counts = [len(queries), 1, 1]
    shape, offset, done, parts = [*tensor.global_shape], [*tensor.global_offset], 0, []
    shape[axis] = kv_heads * (group + 2) * head_dim
    for head, count in zip(heads, counts, strict=True):
        data = tensor.data[done * head_dim : (done + count) * head_dim]
        offset[axis] = head * head_dim
        parts.append(
            dataclasses.replace(
                tensor,
                data=data,
                local_shape=tuple(data.shape),
                global_shape=tuple(shape),
                global_offset=tuple(offset),
                axis_fragmentations=None,
            )
        )
        done += count
    return parts


def _rounds(tensors: Sequence[Any], count: int) -> list[list[Any]]:
    """Parts of about the same number of bytes, in order; some may be empty."""
    total = sum(tensor.data.nbytes for tensor in tensors)
    parts: list[list[Any]] = [[] for _ in range(count)]
    done = 0
    for tensor in tensors:
        parts[min(count - 1, count * done // max(1, total))].append(tensor)
        done += tensor.data.nbytes
    return parts


def _check_format(directory: Path) -> None:
    path = directory / FORMAT_FILE
    try:
        backend = json.loads(path.read_text(encoding="utf-8"))["sharded_backend"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not that of a Megatron checkpoint") from None
    if backend != "torch_dist":
        raise ValueError(f"{path}: format {backend!r} is not supported, only 'torch_dist'")


def _read_metadata(directory: Path) -> Metadata:
    path = directory / TENSORS_FILE
    if not path.is_file():
        raise ValueError(f"the checkpoint {directory} is incomplete: it has no {TENSORS_FILE}")
    try:
        check_names(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    try:
        return FileSystemReader(directory).read_metadata()
    except Exception as error:
        raise ValueError(f"{path} is not what torch writes: {error!r}") from None


def _check_files(directory: Path, metadata: Metadata) -> None:
    """Compare the sizes of all files with what is said to be in them."""
    ends: dict[str, int] = {}
    for info in (metadata.storage_data or {}).values():
        name = info.relative_path
        ends[name] = max(ends.get(name, 0), info.offset + info.length)
    for name, wanted in sorted(ends.items()):
        path = directory / name
        if not path.is_file():
            raise ValueError(f"the checkpoint {directory} is incomplete: {name} is missing")
        if (size := path.stat().st_size) < wanted:
            raise ValueError(
                f"{path} is cut short: {wanted - size} of its {wanted} bytes are missing"
            )
