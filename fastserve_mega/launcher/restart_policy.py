"""When to start again what was lost, and when to give up."""

from __future__ import annotations

from collections import deque

_LONGEST_WAIT_S = 30.0
SETTLED_S = 10.0
"""A loss after serving for so long has nothing to do with the one before."""


class RestartPolicy:
    """At once the first time; with growing pauses when that was in vain. Time is an argument."""

    def __init__(self, max_restarts: int, window_s: float) -> None:
        """Nothing was lost yet.

        Args:
            max_restarts: attempts within the window; one more is refused.
            window_s: length of the window.
        """
        self._max_restarts = max_restarts
        self._window_s = window_s
        self._attempts: deque[float] = deque()
        self._vain = 0
        self._serving_since: float | None = None

    def wait_before_attempt(self, now: float) -> float | None:
        """Seconds to wait before the next attempt, which counts from now on; None: no more."""
        while self._attempts and now - self._attempts[0] >= self._window_s:
            self._attempts.popleft()
        if len(self._attempts) >= self._max_restarts:
            return None
        self._attempts.append(now)
        if self._serving_since is not None and now - self._serving_since >= SETTLED_S:
            self._vain = 0
        self._serving_since = None
        wait_s: float = min(2.0 ** (self._vain - 1), _LONGEST_WAIT_S) if self._vain else 0.0
        self._vain += 1
        return wait_s

    def succeeded(self, now: float) -> None:
        """The last attempt has led to something that serves."""
        self._serving_since = now
