"""Reads parts of tensors from the safetensors files of a directory.

Plain reads into the memory where the values shall be, and no memory maps: the pages of a map count
as memory of the process, for each rank anew.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fastserve_mega import faults
from fastserve_mega.system.weight_files import find_files

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""Weights; by their name in a file's header."""
KINDS = {dtype: kind for kind, dtype in _DTYPES.items()}
_LFS_POINTER = b"version "
"""How it begins."""
_MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
_STAGING_BYTES = 4 * 2**20
"""Bytes of a buffer for values that are converted on their way."""
_SHORT_READ_BYTES = 2048
"""Columns narrower than this are cut out of the whole tensor: it would take too many reads."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies."""

    path: Path
    offset: int
    """Byte of the file at which its values start, row by row."""
    shape: tuple[int, ...]
    kind: str
    """Type of its values, as the file has it: F32, BF16, …"""

    @property
    def dtype(self) -> torch.dtype:
        """Type of its values, as torch has it.

        Raises:
            ValueError: weights of this kind cannot be computed with here.
        """
        if self.kind not in _DTYPES:
            raise ValueError(
                f"{self.path} holds weights as {self.kind}; supported are {', '.join(_DTYPES)}"
            )
        return _DTYPES[self.kind]

    def as_table(self) -> StoredTensor:
        """Return the same values with two axes at most."""
        if len(self.shape) <= 2:
            return self
        shape = (math.prod(self.shape[:-1]), self.shape[-1])
        return dataclasses.replace(self, shape=shape)

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class SafetensorsFiles:
    """The tensors of a directory by name. Use as a context manager.

    All headers are read and all sizes checked at once, so that nothing is found missing after
    minutes of loading.

    Raises:
        ValueError: a file is missing, cut short or malformed; one sentence names it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._stack = ExitStack()
        self._descriptors: dict[Path, int] = {}
        self._whole: tuple[str, Tensor] | None = None
        self._tensors: dict[str, StoredTensor] = {}
        self._read_part = faults.at("rank.read_checkpoint", os.preadv)
        for path in find_files(directory):
            self._tensors.update(_read_header(path))

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
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __getitem__(self, name: str) -> StoredTensor:
        """Where a tensor lies.

        Raises:
            ValueError: there is no such tensor.
        """
        if name not in self._tensors:
            raise ValueError(f"the checkpoint {self.directory} has no tensor {name}")
        return self._tensors[name]

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
        if columns is not None and len(columns) * stored.dtype.itemsize < _SHORT_READ_BYTES:
            whole = self._read_whole(name, stored)
            target.copy_(whole[rows.start : rows.stop, columns.start : columns.stop])
        elif target.is_cpu and target.dtype == stored.dtype and target.is_contiguous():
            self._fill(stored, target, rows, columns)
        else:
            self._convert(stored, target, rows, columns)

    def _convert(
        self, stored: StoredTensor, target: Tensor, rows: range, columns: range | None
    ) -> None:
        """Through a buffer in the file's own dtype."""
        row_shape = (*stored.shape[1:],) if columns is None else (len(columns),)
        row_bytes = math.prod(row_shape) * stored.dtype.itemsize
        count = min(len(rows), max(1, _STAGING_BYTES // max(1, row_bytes)))
        staging = torch.empty((count, *row_shape), dtype=stored.dtype)
        for done in range(0, len(rows), count):
            part = rows[done : done + count]
            self._fill(stored, staging[: len(part)], part, columns)
            target[done : done + len(part)].copy_(staging[: len(part)])

    def _fill(
        self, stored: StoredTensor, target: Tensor, rows: range, columns: range | None
    ) -> None:
        """Read into a contiguous tensor of the same dtype."""
        memory = target.detach().reshape(-1).view(torch.uint8).numpy().data
        start = stored.offset + rows.start * stored.row_bytes
        if columns is None:
            self._read_bytes(stored.path, memory, start)
            return
        itemsize = stored.dtype.itemsize
        start += columns.start * itemsize
        length = len(columns) * itemsize
        for row in range(len(rows)):
            part = memory[row * length : (row + 1) * length]
            self._read_bytes(stored.path, part, start + row * stored.row_bytes)

    def _read_whole(self, name: str, stored: StoredTensor) -> Tensor:
        """The tensor and its name are kept: its other columns are likely to be asked for next."""
        if self._whole is None or self._whole[0] != name:
            self._whole = None  # free the one before
            tensor = torch.empty(stored.shape, dtype=stored.dtype)
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


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """Tensors of a file, once it is known to be whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        begin_bytes = file.read(8)
        if begin_bytes == _LFS_POINTER:
            raise ValueError(
                f"{path} is a pointer of Git LFS and not the file itself; fetch it by git lfs pull"
            )
        length = int.from_bytes(begin_bytes, "little")
        if size < 8 or length > _MAX_HEADER_BYTES:
            raise ValueError(f"{path}: not a safetensors file")
        begin = 8 + length
        _check_size(path, size, begin)
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max((begin + entry["data_offsets"][1] for entry in header.values()), default=0)
            _check_size(path, size, end)
            return {name: _stored(path, begin, entry) for name, entry in header.items()}
        except (KeyError, TypeError, IndexError, AttributeError, UnicodeDecodeError):
            raise ValueError(f"{path}: not a safetensors file: its header is malformed") from None
        except json.JSONDecodeError:
            raise ValueError(f"{path}: not a safetensors file: its header is no JSON") from None


def _check_size(path: Path, size: int, wanted: int) -> None:
    if size < wanted:
        raise ValueError(
            f"{path} is cut short: {wanted - size} of its {wanted} bytes are missing; "
            f"was the download interrupted?"
        )


def _stored(path: Path, begin: int, entry: dict[str, Any]) -> StoredTensor:
    start, end = entry["data_offsets"]
    stored = StoredTensor(path, begin + start, tuple(entry["shape"]), entry["dtype"])
    # A kind that is not known is an error only where somebody asks for it.
    if stored.kind in _DTYPES and math.prod(stored.shape) * stored.dtype.itemsize != end - start:
        raise ValueError(
            f"{path}: {end - start} bytes for a tensor {stored.kind} of shape {list(stored.shape)}"
        )
    return stored
