"""The seam every scheduling policy fills, and the policies that are nothing but a sort key."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

from fastserve_mega.scheduling.queues import SortedQueues
from fastserve_mega.scheduling.request import Place, Request


class Policy(Protocol):
    """Orders the unfinished requests; knows nothing of memory, batches or workers.

    It keeps the requests of each `Place` apart, so that nobody walks over those of another.
    """

    def add(self, request: Request, now: float) -> None:
        """A request arrived."""

    def remove(self, request: Request) -> None:
        """A request ended."""

    def put(self, request: Request, place: Place) -> None:
        """The KV of a request is somewhere else now; sets `request.place`."""

    def charge(self, batch: Sequence[Request], elapsed_s: float) -> None:
        """These requests took part in a step of this many seconds and go on."""

    def promote(self, now: float) -> None:
        """Lift whoever has waited too long."""

    def next_deadline(self, now: float) -> float | None:
        """When `promote` next has something to do."""

    def walk(self, place: Place) -> Iterator[Request]:
        """Requests of a place, the highest priority first, those in flight included."""

    def walk_back(self, place: Place) -> Iterator[Request]:
        """Requests of a place, the lowest priority first."""

    def merged(self, places: Sequence[Place], limit: int) -> Iterator[Request]:
        """Requests of several places, the highest priority first.

        Args:
            places: the waiting first.
            limit: so many of the waiting are enough.
        """

    def count(self, place: Place) -> int:
        """How many requests a place has."""

    def rank(self, request: Request) -> tuple[Any, ...]:
        """Sorts requests by priority; the greatest is the first to give up memory."""

    def scheduled_in_s(self, request: Request, now: float) -> float:
        """ENST: the estimated time until it runs; 0 where the policy cannot estimate it."""

    def soonest_hosted(self, now: float, count: int) -> list[Request]:
        """Of those on the host, the ones to run next by ENST, the soonest first."""

    def latest_residents(self, now: float, count: int) -> list[Request]:
        """Of those on the device, about so many that run last by ENST, the latest first."""

    def level_lengths(self) -> tuple[int, ...]:
        """Unfinished requests of each level, highest first; one number for policies without."""

    def level_quanta_s(self) -> tuple[float, ...]:
        """The quantum of each level; none for policies without."""


class SortedPolicy:
    """A policy whose order is a key of the request."""

    def __init__(self, key: Callable[[Request], tuple[Any, ...]], *, key_changes: bool) -> None:
        """Order by `key`; `key_changes` says whether running changes it."""
        self._queues = SortedQueues(key)
        self._key_changes = key_changes
        self.remove = self._queues.remove
        self.put = self._queues.put
        self.walk = self._queues.walk
        self.walk_back = self._queues.walk_back
        self.merged = self._queues.merged
        self.count = self._queues.count
        self.rank = self._queues.key

    def add(self, request: Request, now: float) -> None:
        self._queues.add(request)

    def charge(self, batch: Sequence[Request], elapsed_s: float) -> None:
        if self._key_changes:
            for request in batch:
                self._queues.update(request)

    def promote(self, now: float) -> None:
        pass

    def next_deadline(self, now: float) -> float | None:
        return None

    def scheduled_in_s(self, request: Request, now: float) -> float:
        return 0.0

    def soonest_hosted(self, now: float, count: int) -> list[Request]:
        return list(islice(self._queues.walk(Place.HOSTED), count))

    def latest_residents(self, now: float, count: int) -> list[Request]:
        return list(islice(self._queues.walk_back(Place.RESIDENT), count))

    def level_lengths(self) -> tuple[int, ...]:
        return (len(self._queues),)

    def level_quanta_s(self) -> tuple[float, ...]:
        return ()
