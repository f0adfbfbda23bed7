"""What `serve` says every few seconds while there is something to do."""

from __future__ import annotations

from collections.abc import Callable

from fastserve_mega.messaging.messages import Snapshot
from fastserve_mega.snapshot import PoolView

INTERVAL_S = 10.0


class StatsLine:
    """One line on the load since the last one; none while nobody asks for anything.

    Args:
        ask: for the state of the coordinator; None when it does not answer.
        now: time on a monotonic clock.
    """

    def __init__(self, ask: Callable[[], Snapshot | None], now: float) -> None:
        self._ask = ask
        self._next = now + INTERVAL_S
        self._before: Snapshot | None = None

    def due(self, now: float) -> str | None:
        """The line, when it is time for one and there was work."""
        if now < self._next:
            return None
        self._next = now + INTERVAL_S
        before, self._before = self._before, self._ask()
        if self._before is None:
            return None
        return describe(self._before, before)


def describe(snapshot: Snapshot, before: Snapshot | None) -> str | None:
    """The load between two snapshots; None when there was none.

    Args:
        snapshot: the newer one.
        before: the older one, of this or an earlier start; None when there is none.
    """
    running = sum(view.running for each in snapshot.replicas for view in each.requests)
    unfinished = sum(sum(each.levels) for each in snapshot.replicas)
    tokens, elapsed_s = snapshot.generation_tokens, snapshot.clock_s
    if before is not None and before.generation_tokens <= tokens and before.clock_s < elapsed_s:
        tokens -= before.generation_tokens
        elapsed_s -= before.clock_s
    elif before is not None:
        return None  # it has started anew, and counts from there
    if not unfinished and not tokens:
        return None
    parts = [
        f"{running} running",
        f"{unfinished - running} waiting",
        f"{tokens / elapsed_s:.1f} tokens/s" if before is not None else f"{tokens} tokens so far",
        f"KV {_share([each.device for each in snapshot.replicas])}",
    ]
    if any(each.host.owned for each in snapshot.replicas):
        parts.append(f"host KV {_share([each.host for each in snapshot.replicas])}")
    return ", ".join(parts)


def _share(pools: list[PoolView]) -> str:
    capacity = sum(pool.capacity for pool in pools)
    return f"{sum(pool.owned for pool in pools) / capacity:.0%}" if capacity else "none"
