"""The copies that some rank has not finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastserve_mega.coordinator.worker_group import WorkersLostError
from fastserve_mega.messaging.messages import CopyResult
from fastserve_mega.plan import BlockCopy, CopyDirection


@dataclass(frozen=True, slots=True)
class CopyDoneEverywhere:
    """A copy that the last rank has reported."""

    copy_id: int
    direction: CopyDirection
    copy_s: float
    """On the rank where it took longest."""


@dataclass(slots=True)
class _CopyInFlight:
    copy: BlockCopy
    dispatched_at: float
    ranks: set[int]
    """Those that have not reported it."""
    copy_s: float = 0.0


class CopiesInFlight:
    """Waits for all ranks: until then a block may still be read on the slowest of them."""

    def __init__(self, ranks: range, timeout_s: float) -> None:
        """Start empty.

        Args:
            ranks: each of them executes every copy.
            timeout_s: longest wait for a copy (coordinator.step_timeout_s).
        """
        self._ranks = ranks
        self._timeout_s = timeout_s
        self._copies: dict[int, _CopyInFlight] = {}

    def __len__(self) -> int:
        return len(self._copies)

    def dispatched(self, copies: Sequence[BlockCopy], now: float) -> None:
        """Take note of copies that all ranks have been told to make."""
        for copy in copies:
            self._copies[copy.copy_id] = _CopyInFlight(copy, now, set(self._ranks))

    def reported(self, result: CopyResult) -> CopyDoneEverywhere | None:
        """Take note of a rank's report; what to make of it when it was the last one.

        Raises:
            WorkersLostError: nobody waits for this report.
        """
        flying = self._copies.get(result.copy_id)
        if flying is None or result.rank not in flying.ranks:
            raise WorkersLostError(
                f"rank {result.rank} reported copy {result.copy_id}, which it was not asked for"
            )
        flying.ranks.remove(result.rank)
        flying.copy_s = max(flying.copy_s, result.copy_s)
        if flying.ranks:
            return None
        del self._copies[result.copy_id]
        return CopyDoneEverywhere(result.copy_id, flying.copy.direction, flying.copy_s)

    def deadline(self) -> float | None:
        """When the oldest copy is overdue."""
        # Dispatched in this order.
        oldest = next(iter(self._copies.values()), None)
        return None if oldest is None else oldest.dispatched_at + self._timeout_s

    def check_deadline(self, now: float) -> None:
        """Raise WorkersLostError when a copy is overdue."""
        for copy_id, flying in self._copies.items():
            if now - flying.dispatched_at > self._timeout_s:
                raise WorkersLostError(
                    f"copy {copy_id} has not been reported by ranks {sorted(flying.ranks)} within "
                    f"{self._timeout_s:g} s (coordinator.step_timeout_s)"
                )
            return
