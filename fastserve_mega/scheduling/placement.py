"""Which replica a request goes to."""

from __future__ import annotations

from collections.abc import Sequence

from fastserve_mega.scheduling.events import Arrived
from fastserve_mega.scheduling.scheduler import Scheduler

_FIRST_GUESS_TOKENS = 128.0
"""Length of an answer before any has ended."""
_MEMORY = 100
"""Answers over which the mean length is taken."""


class Placement:
    """Sends each request to the replica where it is expected to be finished first.

    That is where the work at hand and the request's own prefill together take the least time; a
    prefix in a replica's cache makes the latter shorter, so conversations stay where they are
    unless others are much less busy. Of equals, the one with the lowest number.
    """

    def __init__(self, schedulers: Sequence[Scheduler]) -> None:
        """One scheduler per replica."""
        self._schedulers = schedulers
        self._output_tokens = _FIRST_GUESS_TOKENS
        self._finished = 0
        self._promised_s = [0.0] * len(schedulers)

    def choose(self, arrived: Arrived) -> int:
        """Number of the replica, which has to be told before the next call of `settle`."""
        if len(self._schedulers) == 1:
            return 0
        added_s = [each.added_work_s(arrived, self._output_tokens) for each in self._schedulers]
        ready_s = [
            each.expected_work_s(self._output_tokens) + promised_s + own_s
            for each, promised_s, own_s in zip(
                self._schedulers, self._promised_s, added_s, strict=True
            )
        ]
        replica = ready_s.index(min(ready_s))
        self._promised_s[replica] += added_s[replica]
        return replica

    def settle(self) -> None:
        """The schedulers have been told of all requests that were placed."""
        self._promised_s = [0.0] * len(self._schedulers)

    def observe_finish(self, output_tokens: int) -> None:
        """Learn from the length of an answer that was not cut short."""
        self._finished = min(self._finished + 1, _MEMORY)
        self._output_tokens += (output_tokens - self._output_tokens) / self._finished
