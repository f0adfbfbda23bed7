"""Pools of KV block ids. The same id means the same block on every rank."""

from __future__ import annotations

from collections.abc import Iterable

NULL_BLOCK = 0
"""Never owned and never written; it pads block tables."""


class BlockPool:
    """Free block ids of one memory; each id is either in here or owned by one request."""

    def __init__(self, num_blocks: int) -> None:
        """Make a pool of the ids 1 .. num_blocks - 1, all free; of 0 or 1 blocks, an empty one."""
        if num_blocks < 0:
            raise ValueError(f"a pool cannot have {num_blocks} blocks")
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, NULL_BLOCK, -1))

    @property
    def capacity(self) -> int:
        """Blocks that can be owned."""
        return max(self.num_blocks - 1, 0)

    @property
    def free_count(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, the most recently freed first.

        Raises:
            MemoryError: fewer are free; the pool is unchanged.
        """
        if count > len(self._free):
            raise MemoryError(f"{count} blocks asked for, {len(self._free)} are free")
        kept = len(self._free) - count
        taken = self._free[kept:]
        del self._free[kept:]
        return taken

    def free(self, block_ids: Iterable[int]) -> None:
        self._free.extend(block_ids)

    def check_integrity(self, owned: list[int]) -> None:
        """Raise RuntimeError unless free and owned ids partition the pool exactly."""
        if sorted(self._free + owned) != list(range(1, self.num_blocks)):
            raise RuntimeError("free and owned blocks do not partition the pool")
