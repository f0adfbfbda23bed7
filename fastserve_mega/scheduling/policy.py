"""The seam every scheduling policy fills, and the policies that are nothing but a sort key."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from fastserve_mega.scheduling.queues import SortedQueue
from fastserve_mega.scheduling.request import Request


class Policy(Protocol):
    """Orders the unfinished requests; knows nothing of memory, batches or workers."""

    def add(self, request: Request, now: float) -> None:
        """A request arrived."""

    def remove(self, request: Request) -> None:
        """A request ended."""

    def charge(self, batch: Sequence[Request], elapsed_s: float) -> None:
        """These requests took part in a step of this many seconds and go on."""

    def promote(self, now: float) -> None:
        """Lift whoever has waited too long."""

    def next_deadline(self, now: float) -> float | None:
        """When `promote` next has something to do."""

    def by_priority(self) -> Iterable[Request]:
        """All unfinished requests, the highest priority first, those in flight included."""

    def rank(self, request: Request) -> tuple[Any, ...]:
        """Sorts requests as `by_priority` does; the greatest is the first to give up memory."""

    def next_scheduled(self, now: float) -> Callable[[Request], tuple[Any, ...]]:
        """Return a sort key: who will run next comes first.

        Its first element is the estimated time until then in seconds (ENST), 0 where the policy
        cannot estimate it.
        """

    def level_lengths(self) -> tuple[int, ...]:
        """Unfinished requests of each level, highest first; one number for policies without."""


class SortedPolicy:
    """A policy whose order is a key of the request."""

    def __init__(self, key: Callable[[Request], tuple[Any, ...]], *, key_changes: bool) -> None:
        """Order by `key`; `key_changes` says whether running changes it."""
        self._queue = SortedQueue(key)
        self._key_changes = key_changes

    def add(self, request: Request, now: float) -> None:
        self._queue.add(request)

    def remove(self, request: Request) -> None:
        self._queue.remove(request)

    def charge(self, batch: Sequence[Request], elapsed_s: float) -> None:
        if self._key_changes:
            for request in batch:
                self._queue.update(request)

    def promote(self, now: float) -> None:
        pass

    def next_deadline(self, now: float) -> float | None:
        return None

    def by_priority(self) -> Iterable[Request]:
        return self._queue

    def rank(self, request: Request) -> tuple[Any, ...]:
        return self._queue.key(request)

    def next_scheduled(self, now: float) -> Callable[[Request], tuple[Any, ...]]:
        key = self._queue.key
        return lambda request: (0.0, *key(request))

    def level_lengths(self) -> tuple[int, ...]:
        return (len(self._queue),)
