"""Which blocks are being copied between the pools, until all ranks have reported it done."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fastserve_mega.plan import BlockCopy, CopyDirection
from fastserve_mega.scheduling.request import Request
from fastserve_mega.types import BlockHash

_SMOOTHING = 0.1


@dataclass(slots=True)
class Copy:
    """A copy of some blocks of one request, or of blocks kept for their content."""

    request: Request | None
    direction: CopyDirection
    leaving: tuple[int, ...] = ()
    """Device blocks that become free when it is done."""
    makes_clean: int = 0
    """How many leading blocks of the request are clean when it is done."""
    host_blocks: tuple[int, ...] = ()
    """Host blocks that are owned by the copy itself, and given up when it is done."""
    host_hashes: tuple[BlockHash, ...] = ()
    """Contents of the host blocks when it is done; empty when they are only read."""
    num_blocks: int = 0
    """Copied."""
    started_s: float = 0.0
    """When its plan was made."""


class CopyLedger:
    """The copies that were decided and not yet reported done."""

    def __init__(self) -> None:
        self.swapped_out_blocks = 0
        """Copied to the host, ahead of need included."""
        self.swapped_in_blocks = 0
        self.leaving_blocks = 0
        """Device blocks that become free when their copies are done."""
        self.copying_out = 0
        """Copies to the host under way."""
        self.block_s = 0.0
        """Seconds that a copy takes for each of its blocks, smoothed; 0 until one was done."""
        self._outstanding: dict[int, Copy] = {}
        self._planned: list[BlockCopy] = []
        self._next_id = 0

    @property
    def outstanding(self) -> Iterable[Copy]:
        return self._outstanding.values()

    def start(
        self,
        copy: Copy,
        sources: Sequence[int],
        targets: Sequence[int],
        precedes_step: int | None,
    ) -> None:
        """Put a copy into the next plan."""
        if copy.direction is CopyDirection.SWAP_OUT:
            self.swapped_out_blocks += len(sources)
            self.copying_out += 1
        else:
            self.swapped_in_blocks += len(sources)
        self.leaving_blocks += len(copy.leaving)
        if copy.request:
            copy.request.kv.num_copies += 1
        copy.num_blocks = len(sources)
        copy_id = self._next_id
        self._next_id += 1
        self._outstanding[copy_id] = copy
        self._planned.append(
            BlockCopy(copy_id, copy.direction, tuple(sources), tuple(targets), precedes_step)
        )

    def take_planned(self, now: float) -> tuple[BlockCopy, ...]:
        """Return the copies started since the last call, for the plan that is made now."""
        planned, self._planned = self._planned, []
        for block_copy in planned:
            self._outstanding[block_copy.copy_id].started_s = now
        return tuple(planned)

    def done(self, copy_id: int, now: float) -> Copy | None:
        """Strike off and return a finished copy; None for one from before the ranks were lost."""
        copy = self._outstanding.pop(copy_id, None)
        if copy is not None:
            if copy.num_blocks:
                # Its time includes that spent in the ranks' queues.
                measured = (now - copy.started_s) / copy.num_blocks
                self.block_s += (_SMOOTHING if self.block_s else 1.0) * (measured - self.block_s)
            if copy.request:
                copy.request.kv.num_copies -= 1
            self.leaving_blocks -= len(copy.leaving)
            if copy.direction is CopyDirection.SWAP_OUT:
                self.copying_out -= 1
        return copy

    def forget_all(self) -> None:
        """The ranks were lost, and with them what they were copying."""
        for copy in self._outstanding.values():
            if copy.request:
                copy.request.kv.num_copies = 0
        self._outstanding.clear()
        self._planned.clear()
        self.leaving_blocks = 0
        self.copying_out = 0
