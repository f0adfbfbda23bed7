"""How long requests wait for their first step, and which of them need not begin to."""

from __future__ import annotations

import math
from itertools import takewhile

from fastserve_mega.coordinator.live_request import LiveRequest

_MEMORY_S = 60.0
"""The rate is taken over so much waiting."""
_FEW_STARTS = 4
"""After so many starts while others waited their rate is believed, or after the longest wait."""
_BURST_SHARE = 0.1
"""What waits no longer than this share of the limit is a burst, however much it is."""
_CALM_S = 1.0
"""After so long without a queue the next one is a burst again."""


class WaitingRequests:
    """Counts the requests of a replica that wait for their first step, and how fast they get it.

    Only the time after a step that left some waiting is counted: then their rate is what the ranks
    can do under the policy in force, and not what they were asked to. Work in the background is
    left out.
    """

    def __init__(self) -> None:
        self._waiting = 0
        self._started = 0
        """Of the step that is being dispatched."""
        self._standing_since = -math.inf
        """When a step first left some waiting, after a calm."""
        self._calm_since: float | None = -math.inf
        """Since when each step has left nobody waiting; None when the last one left some."""
        self._stepped_at = 0.0
        self._num_starts = 0
        self._starts = 0.0
        self._seconds = 0.0
        """In which there were `_starts`; both fade."""
        self._latest: dict[LiveRequest, float] = {}
        """By when those have to start that were let in since they would; the earliest first."""

    def join(self) -> None:
        """One more waits."""
        self._waiting += 1

    def start(self, live: LiveRequest) -> None:
        """One of them is in the step that is being dispatched."""
        self._waiting -= 1
        self._started += 1
        self._latest.pop(live, None)

    def leave(self, live: LiveRequest, now: float) -> None:
        """One of them has ended before its first step."""
        self._waiting -= 1
        self._latest.pop(live, None)
        if not self._waiting:
            self._calm_down(now)

    def end_step(self, now: float) -> None:
        """A step was dispatched, with those that have started."""
        self._count(now)
        if self._calm_since is None:
            self._num_starts += self._started
            self._starts += self._started
        self._started = 0
        if not self._waiting:
            self._calm_down(now)
            return
        if self._is_calm(now):
            self._standing_since = now
        self._calm_since = None

    def pace_s(self, max_wait_s: float, now: float) -> float | None:
        """Tell how many seconds pass from start to start.

        Args:
            max_wait_s: longest wait for a first step, seconds.
            now: time of the same clock as elsewhere.

        Returns:
            None while nobody need be rejected: this is a burst, or not known yet.
        """
        if self._is_calm(now):
            return None
        is_known = self._num_starts >= _FEW_STARTS
        if now - self._standing_since < max_wait_s * (_BURST_SHARE if is_known else 1.0):
            return None
        self._count(now)
        # One start more than there were: so a rate is never 0, however long a step takes.
        return self._seconds / (self._starts + 1)

    def expect(self, live: LiveRequest, latest: float) -> None:
        """Watch a request that is to start by then, and not before those that are watched."""
        self._latest[live] = latest

    def late(self, now: float) -> list[LiveRequest]:
        """Those that were expected to have started by now."""
        return list(takewhile(lambda live: self._latest[live] <= now, self._latest))

    def _calm_down(self, now: float) -> None:
        self._count(now)
        self._calm_since = now if self._calm_since is None else self._calm_since

    def _is_calm(self, now: float) -> bool:
        return self._calm_since is not None and now - self._calm_since >= _CALM_S

    def _count(self, now: float) -> None:
        if self._calm_since is None:
            passed_s = now - self._stepped_at
            fading = math.exp(-passed_s / _MEMORY_S)
            self._starts *= fading
            self._seconds = self._seconds * fading + passed_s
        self._stepped_at = now
