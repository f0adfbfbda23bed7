"""The hashes of a request's blocks, in little memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import overload

from fastserve_mega.types import BlockHash


class BlockHashes:
    """Behaves as a list that grows; no hash ends in a blank.

    They are one text, each as long as the longest: a list of those of a long prompt takes more than
    its tokens do, and thousands of prompts may wait.
    """

    __slots__ = ("_text", "_width")

    def __init__(self, hashes: Iterable[BlockHash] = ()) -> None:
        self._pack(list(hashes))

    def _pack(self, hashes: list[BlockHash]) -> None:
        self._width = max(map(len, hashes), default=1)
        self._text = "".join([each.ljust(self._width) for each in hashes])

    def __len__(self) -> int:
        return len(self._text) // self._width

    @overload
    def __getitem__(self, index: int) -> BlockHash: ...
    @overload
    def __getitem__(self, index: slice) -> list[BlockHash]: ...
    def __getitem__(self, index: int | slice) -> BlockHash | list[BlockHash]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} hashes, got index {index}")
        start = index * self._width
        return BlockHash(self._text[start : start + self._width].rstrip())

    def append(self, block_hash: BlockHash) -> None:
        if len(block_hash) > self._width:
            self._pack([*self[:], block_hash])
        else:
            self._text += block_hash.ljust(self._width)
