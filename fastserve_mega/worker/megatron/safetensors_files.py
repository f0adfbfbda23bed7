"""Reads parts of tensors from the safetensors files of a directory, and writes such files.

Plain reads into the memory where the values shall be, and no memory maps: the pages of a map count
as memory of the process, for each rank anew.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fastserve_mega import faults
from fastserve_mega.system.stored_tensors import INDEX_FILE, SINGLE_FILE, StoredTensor, read_tensors

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""Weights; by their name in a file's header."""
KINDS = {dtype: kind for kind, dtype in _DTYPES.items()}
_STAGING_BYTES = 4 * 2**20
"""Bytes of a buffer for values that are converted on their way."""
_SHORT_READ_BYTES = 2048
"""Columns narrower than this are cut out of the whole tensor: it would take too many reads."""
_SHARD_BYTES = 5 * 10**9


class SafetensorsFiles:
    """The tensors of a directory by name. Use as a context manager.

    Raises:
        ValueError: see `read_tensors`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._stack = ExitStack()
        self._descriptors: dict[Path, int] = {}
        self._whole: tuple[str, Tensor] | None = None
        self.tensors: Mapping[str, StoredTensor] = read_tensors(directory)
        self._read_part = faults.at("rank.read_checkpoint", os.preadv)

    def __enter__(self) -> SafetensorsFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()
        self._descriptors.clear()
        self._whole = None

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __getitem__(self, name: str) -> StoredTensor:
        """Where a tensor lies.

        Raises:
            ValueError: there is no such tensor.
        """
        if name not in self.tensors:
            raise ValueError(f"the checkpoint {self.directory} has no tensor {name}")
        return self.tensors[name]

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor's values.

        Raises:
            ValueError: there is no such tensor, or weights of its kind cannot be computed with.
        """
        return _dtype_of(self[name])

    def is_same(self, name: str, other: str) -> bool:
        """Whether two tensors have the same values; reads them up to the first difference.

        Raises:
            ValueError: there is no such tensor, or one of a kind that cannot be computed with.
        """
        first, second = self[name], self[other]
        if first.shape != second.shape:
            return False
        count = max(1, _STAGING_BYTES // max(1, 4 * math.prod(first.shape[1:])))
        for start in range(0, first.shape[0], count):
            rows = range(start, min(start + count, first.shape[0]))
            ours, theirs = torch.empty((2, len(rows), *first.shape[1:]))
            self.read(name, ours, rows)
            self.read(other, theirs, rows)
            if not torch.equal(ours, theirs):
                return False
        return True

    def read(self, name: str, target: Tensor, rows: range, columns: range | None = None) -> None:
        """Copy a part of a tensor to `target`, which has its shape, on any device in any dtype.

        Args:
            name: of the tensor in the files.
            target: [rows, columns], or [rows] of a vector.
            rows: of its first axis, with step 1; of a tensor with more than two axes, those of all
                its matrices below each other.
            columns: of its last axis; None is all of them.

        Raises:
            ValueError: the file has become shorter meanwhile.
        """
        stored = self[name].as_table()
        if columns is not None and len(columns) == stored.shape[1]:
            columns = None
        if columns is not None and len(columns) * stored.item_bytes < _SHORT_READ_BYTES:
            whole = self._read_whole(name, stored)
            target.copy_(whole[rows.start : rows.stop, columns.start : columns.stop])
        elif target.is_cpu and target.dtype == _dtype_of(stored) and target.is_contiguous():
            self._fill(stored, target, rows, columns)
        else:
            self._convert(stored, target, rows, columns)

    def _convert(
        self, stored: StoredTensor, target: Tensor, rows: range, columns: range | None
    ) -> None:
        """Through a buffer in the file's own dtype."""
        row_shape = (*stored.shape[1:],) if columns is None else (len(columns),)
        row_bytes = math.prod(row_shape) * stored.item_bytes
        count = min(len(rows), max(1, _STAGING_BYTES // max(1, row_bytes)))
        is_cuda = target.is_cuda
        shape, dtype = (count, *row_shape), _dtype_of(stored)
        staging = torch.empty(shape, dtype=dtype, pin_memory=is_cuda)
        for done in range(0, len(rows), count):
            if is_cuda and done:
                # The last part is on its way; torch gives its memory back when it has arrived.
                staging = torch.empty_like(staging, pin_memory=True)
            part = rows[done : done + count]
            self._fill(stored, staging[: len(part)], part, columns)
            target[done : done + len(part)].copy_(staging[: len(part)], non_blocking=is_cuda)

    def _fill(
        self, stored: StoredTensor, target: Tensor, rows: range, columns: range | None
    ) -> None:
        """Read into a contiguous tensor of the same dtype."""
        memory = target.detach().reshape(-1).view(torch.uint8).numpy().data
        start = stored.offset + rows.start * stored.row_bytes
        if columns is None:
            self._read_bytes(stored.path, memory, start)
            return
        itemsize = stored.item_bytes
        start += columns.start * itemsize
        length = len(columns) * itemsize
        for row in range(len(rows)):
            part = memory[row * length : (row + 1) * length]
            self._read_bytes(stored.path, part, start + row * stored.row_bytes)

    def _read_whole(self, name: str, stored: StoredTensor) -> Tensor:
        """The tensor and its name are kept: its other columns are likely to be asked for next."""
        if self._whole is None or self._whole[0] != name:
            self._whole = None  # free the one before
            tensor = torch.empty(stored.shape, dtype=_dtype_of(stored))
            self._fill(stored, tensor, range(stored.shape[0]), None)
            self._whole = (name, tensor)
        return self._whole[1]

    def _read_bytes(self, path: Path, memory: memoryview, offset: int) -> None:
        descriptor = self._descriptor(path)
        while memory:
            count = self._read_part(descriptor, [memory], offset)
            if not count:
                raise ValueError(f"{path} has become shorter while it was read")
            memory, offset = memory[count:], offset + count

    def _descriptor(self, path: Path) -> int:
        if path not in self._descriptors:
            file = self._stack.enter_context(path.open("rb", buffering=0))
            self._descriptors[path] = file.fileno()
        return self._descriptors[path]


def _dtype_of(stored: StoredTensor) -> torch.dtype:
    _ = stored.item_bytes  # refuses the kinds that are no weights
    return _DTYPES[stored.kind]


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
