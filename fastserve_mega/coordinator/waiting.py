"""How long requests wait for their first step, and which of them need not begin to."""

from __future__ import annotations

import math

_MEMORY_S = 60.0
"""The rate is taken over so much waiting."""
_FEW_STARTS = 16
"""So many requests have to have started while others waited before their rate is believed."""
_BURST_SHARE = 0.1
"""What waits no longer than this share of the limit is a burst, however much it is."""


class WaitingRequests:
    """Counts the requests of a replica that wait for their first step, and how fast they get it.

    Only the time in which some wait is counted: then their rate is what the ranks can do under the
    policy in force, and not what they were asked to. Work in the background is left out.
    """

    def __init__(self) -> None:
        self._waiting = 0
        self._since = 0.0
        """When the first of them came, after nobody waited."""
        self._counted_until = 0.0
        self._num_started = 0
        self._starts = 0.0
        self._seconds = 0.0
        """In which there were `_starts`; both fade."""

    def join(self, now: float) -> None:
        """One more waits."""
        self._count(now)
        if not self._waiting:
            self._since = now
        self._waiting += 1

    def start(self, now: float) -> None:
        """One of them is in a step."""
        self._count(now)
        self._num_started += 1
        self._starts += 1
        self._waiting -= 1

    def leave(self, now: float) -> None:
        """One of them has ended before its first step."""
        self._count(now)
        self._waiting -= 1

    def excess_s(self, ahead: int, max_wait_s: float, now: float) -> float | None:
        """Tell by how many seconds a request would wait too long; None when it would not.

        Args:
            ahead: others that start before it.
            max_wait_s: longest wait for a first step, seconds.
            now: time of the same clock as elsewhere.
        """
        self._count(now)
        is_burst = now - self._since < _BURST_SHARE * max_wait_s
        if not ahead or is_burst or self._num_started < _FEW_STARTS:
            return None
        # One start more than there were: so a rate is never 0, however long a step takes.
        excess_s = (ahead + 1) * self._seconds / (self._starts + 1) - max_wait_s
        return excess_s if excess_s > 0 else None

    def _count(self, now: float) -> None:
        if self._waiting:
            passed_s = now - self._counted_until
            fading = math.exp(-passed_s / _MEMORY_S)
            self._starts *= fading
            self._seconds = self._seconds * fading + passed_s
        self._counted_until = now
