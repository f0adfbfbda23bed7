"""Weights that a checkpoint holds in 8 bits, with their scales; and others made into such.

As DeepSeek and Qwen write them (`weight_scale_inv`, one scale for each block of 128 x 128), and as
llm-compressor does (`weight_scale`, one for the tensor or for each output). Either way a weight is
what is stored times its scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastserve_mega.worker.float8 import quantize_rows
from fastserve_mega.worker.megatron.safetensors_files import SafetensorsFiles

_SCALES = ("_scale", "_scale_inv")
"""Ends of the names of scales, behind that of their weight."""
_ELEMENTS_AT_ONCE = 2**22
"""So much of a weight is on its way from one precision to another."""


class ScaledWeights:
    """Reads weights from files, whether they are scaled or not.

    Args:
        files: of the checkpoint.
        block: outputs and inputs of a block with a scale of its own, where there are blocks.
    """

    def __init__(self, files: SafetensorsFiles, block: tuple[int, int] | None) -> None:
        self._files = files
        self._block = block

    def check(self, name: str) -> None:
        """See that a tensor is no weight in 8 bits, or one whose scales are there.

        Raises:
            ValueError: it has none, or not as many as it should.
        """
        stored = self._files[name]
        if self._files.dtype(name) != torch.float8_e4m3fn:
            return
        scale, shape = self._scale_name(name), stored.shape
        if scale is None:
            raise ValueError(f"the checkpoint's {name} is in 8 bits, but has no scale beside it")
        has = self._files[scale].shape
        wanted: list[tuple[int, ...]] = [(), (1,), (1, 1), shape[:1], (shape[0], 1)]
        if self._block is not None:
            sizes = zip(shape, self._block, strict=True)
            wanted.append(tuple(-(-size // block) for size, block in sizes))
        if len(shape) != 2 or has not in wanted:
            raise ValueError(
                f"the checkpoint's {scale} has shape {has}, which is none of those that scales of "
                f"{shape} can have: {', '.join(map(str, wanted))}"
            )

    def read(self, name: str, target: Tensor, rows: range, columns: range | None = None) -> None:
        """As SafetensorsFiles.read, times the scales."""
        if self._files.dtype(name) != torch.float8_e4m3fn:
            self._files.read(name, target, rows, columns)
            return
        assert columns is not None  # a matrix, by `check`
        for done, part in _parts(rows, len(columns)):
            raw = torch.empty((len(part), len(columns)), dtype=torch.float8_e4m3fn)
            self._files.read(name, raw, part, columns)
            wide = raw.float().mul_(self._scales(name, part, columns))
            target[done : done + len(part)].copy_(wide)

    def read_float8(
        self,
        name: str,
        target: tuple[Tensor, Tensor],
        rows: range,
        columns: range,
        *,
        transposed: bool,
    ) -> None:
        """Read a part of a weight in 8 bits, with a scale for each row.

        What is stored so stays what it is; scales of blocks become scales of rows.

        Args:
            name: of the tensor in the files.
            target: values [rows, columns] and scales [rows] to fill, on any device.
            rows: of the weight.
            columns: of the weight.
            transposed: the files have the axes in the other order.
        """
        values, scales = target
        if self._has_row_scales(name) and not transposed:
            self._files.read(name, values, rows, columns)
            scales.copy_(self._scales(name, rows, columns).flatten())
            return
        for done, part in _parts(rows, len(columns)):
            wide = torch.empty((len(part), len(columns)))
            if transposed:
                self.read(name, wide.t(), columns, part)
            else:
                self.read(name, wide, part, columns)
            made = quantize_rows(wide.to(values.device))
            values[done : done + len(part)].copy_(made.values)
            scales[done : done + len(part)].copy_(made.scales)

    def _has_row_scales(self, name: str) -> bool:
        """Whether a stored weight has one scale for each row, or one for all."""
        scale = self._scale_name(name)
        if scale is None:
            return False
        rows = self._files[name].shape[0]
        return self._files[scale].shape in ((), (1,), (1, 1), (rows,), (rows, 1))

    def _scales(self, name: str, rows: range, columns: range) -> Tensor:
        """What a part of a weight is to be multiplied by: [rows or 1, columns or 1]."""
        scale = self._scale_name(name)
        assert scale is not None  # by `check`
        shape = self._files[scale].shape
        whole = torch.empty(shape if shape else (1,))
        self._files.read(scale, whole, range(len(whole)))
        if whole.numel() == 1:
            return whole.view(1, 1).expand(len(rows), 1)
        if self._has_row_scales(name):
            return whole.view(-1, 1)[rows.start : rows.stop]
        assert self._block is not None
        height, width = self._block
        by_row = torch.arange(rows.start, rows.stop) // height
        by_column = torch.arange(columns.start, columns.stop) // width
        return whole[by_row][:, by_column]

    def _scale_name(self, name: str) -> str | None:
        return next((name + end for end in _SCALES if name + end in self._files), None)


def _parts(rows: range, columns: int) -> list[tuple[int, range]]:
    """Ranges of rows with a bounded number of elements, and how many rows come before."""
    count = max(1, _ELEMENTS_AT_ONCE // max(1, columns))
    return [(done, rows[done : done + count]) for done in range(0, len(rows), count)]
