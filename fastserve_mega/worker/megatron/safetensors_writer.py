"""Writes safetensors files tensor by tensor, with no more than one in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastserve_mega.system.weight_files import INDEX_FILE, SINGLE_FILE
from fastserve_mega.worker.megatron.safetensors_files import KINDS

_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a tensor before its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    directory: Path,
    infos: Mapping[str, TensorInfo],
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """Write one file, or shards of up to 5 GB and their index.

    Args:
        directory: exists.
        infos: by name, in the order of the tensors.
        tensors: name and values of each.
    """
    shards = _split(infos)
    names = [SINGLE_FILE]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    remaining = iter(tensors)
    for file_name, shard in zip(names, shards, strict=True):
        with (directory / file_name).open("wb") as file:
            file.write(_header(shard))
            for name, info in shard.items():
                found, tensor = next(remaining)
                if (found, tuple(tensor.shape), tensor.dtype) != (name, info.shape, info.dtype):
                    raise RuntimeError(f"{found} came where {name} {info} was announced")
                file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    if len(shards) > 1:
        places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(info.num_bytes for info in infos.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _split(infos: Mapping[str, TensorInfo]) -> list[dict[str, TensorInfo]]:
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, info in infos.items():
        if shards[-1] and size + info.num_bytes > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = info
        size += info.num_bytes
    return shards


def _header(shard: Mapping[str, TensorInfo]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in shard.items():
        entries[name] = {
            "dtype": KINDS[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.num_bytes],
        }
        offset += info.num_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
