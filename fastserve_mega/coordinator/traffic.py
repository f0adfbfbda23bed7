"""What came in and went out, counted for those who watch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from fastserve_mega.messaging.messages import Snapshot
from fastserve_mega.snapshot import Percentiles, ReplicaView

_REMEMBERED = 500
"""Requests over which percentiles are taken."""


class Traffic:
    """Counts from the start of the server, and the times of the latest requests."""

    def __init__(self) -> None:
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._finished = 0
        self._ttft_s: deque[float] = deque(maxlen=_REMEMBERED)
        self._jct_s: deque[float] = deque(maxlen=_REMEMBERED)

    def arrived(self, prompt_tokens: int) -> None:
        self._prompt_tokens += prompt_tokens

    def generated(self, since_arrival_s: float, *, is_first: bool) -> None:
        """One token, so long after its request arrived."""
        self._generation_tokens += 1
        if is_first:
            self._ttft_s.append(since_arrival_s)

    def finished(self, jct_s: float) -> None:
        self._finished += 1
        self._jct_s.append(jct_s)

    def snapshot(self, now: float, replicas: Iterable[ReplicaView]) -> Snapshot:
        """All of it, and what the schedulers say."""
        return Snapshot(
            clock_s=now,
            replicas=tuple(replicas),
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            finished_requests=self._finished,
            ttft_s=_percentiles(self._ttft_s),
            jct_s=_percentiles(self._jct_s),
        )


def _percentiles(seconds: Iterable[float]) -> Percentiles:
    """By nearest rank; all zero when there is none."""
    ordered = sorted(seconds)
    if not ordered:
        return Percentiles()

    def at(share: float) -> float:
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]

    return Percentiles(sum(ordered) / len(ordered), at(0.5), at(0.95), at(0.99))
