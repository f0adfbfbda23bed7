"""After ranks were lost: finds out which request did it, if one did, without losing many times."""

from __future__ import annotations

from collections import deque

from fastserve_mega.coordinator.live_request import LiveRequest

MAX_FAILED_ATTEMPTS = 2
"""A request is given up after so many losses in a row."""
_PROBATION_S = 60.0
"""Clients submit again what ranks were lost with within this time of the start. Later, nobody can
make others wait by saying so."""


class Gate:
    """Lets new requests through to the replicas.

    All pass at once, but for suspects: requests that lost ranks were computing, without a token
    since. They go before all others and one at a time, until their next token or end. When ranks
    are lost again it is then known with which of them.

    Args:
        opened: when the coordinator started, seconds.
    """

    def __init__(self, opened: float) -> None:
        self._opened = opened
        self._suspects: deque[LiveRequest] = deque()
        self._others: deque[LiveRequest] = deque()
        self._on_trial: LiveRequest | None = None

    def enter(self, live: LiveRequest, now: float) -> None:
        """Line up."""
        suspected = live.submit.failed_attempts > 0 and now - self._opened < _PROBATION_S
        (self._suspects if suspected else self._others).append(live)

    def pass_through(self) -> list[LiveRequest]:
        """Requests whose turn it is."""
        if self._on_trial is not None:
            return []
        if self._suspects:
            self._on_trial = self._suspects.popleft()
            return [self._on_trial]
        passed = list(self._others)
        self._others.clear()
        return passed

    def clear(self, live: LiveRequest) -> None:
        """A request yielded a token, so it is not suspected any more."""
        if self._on_trial is live:
            self._on_trial = None

    def leave(self, live: LiveRequest) -> None:
        """A request ended, wherever it is."""
        self.clear(live)
        for line in (self._suspects, self._others):
            if live in line:
                line.remove(live)
