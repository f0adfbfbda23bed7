"""Ordered sets of requests, by where their KV is, that stay cheap at any length.

A step looks at the few requests it can do something with. So each place has an order of its own:
a hundred thousand waiting or swapped-out requests are not walked over on the way to those that run.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, Protocol, TypeVar

from fastserve_mega.scheduling.request import Place, Request, RequestStatus

_PIECE = 512

T = TypeVar("T")


class RequestQueues(Protocol):
    """Ordered requests; each has one place, and each place an order of its own."""

    def __len__(self) -> int: ...

    def add(self, request: Request) -> None:
        """Queue a request that arrived."""

    def remove(self, request: Request) -> None:
        """Take out a request, which is about to end."""

    def put(self, request: Request, status: RequestStatus) -> None:
        """Set the status of a request whose KV is somewhere else now."""

    def update(self, request: Request) -> None:
        """Sort a request in again when its key has changed."""

    def advance(self, request: Request) -> None:
        """Let a request that lost its KV come sooner, if the order has such a thing."""

    def rank(self, request: Request) -> tuple[Any, ...]:
        """Return what sorts requests; the greatest is the first to give up memory."""

    def walk(self, place: Place) -> Iterator[Request]:
        """Iterate over a place, the first first, those in a step included."""

    def iter_reversed(self, place: Place) -> Iterator[Request]:
        """Iterate over a place, the last first; over those who have KV only."""

    def merged(
        self, places: Sequence[Place], limit: int, also: Sequence[Request] = ()
    ) -> Iterator[Request]:
        """Iterate over several places as one.

        Args:
            places: the waiting first.
            limit: so many of the waiting are enough, a step admits but a few.
            also: of the waiting; these come in any case.
        """

    def count(self, place: Place) -> int:
        """Return how many requests a place has."""

    def num_waiting_before(self, request: Request) -> int:
        """Return how many requests wait before one that has just come to wait."""

    def level_lengths(self) -> tuple[int, ...]:
        """Return how many requests each level has, the highest first."""


class SortedQueues:
    """Requests of each place in the order of a key.

    Sorted lists: adding and removing move pointers in one memmove, which at 100,000 entries takes
    a few microseconds and beats a tree written in Python.
    """

    def __init__(self, key: Callable[[Request], tuple[Any, ...]]) -> None:
        """Order by `key`, which must end in a number unique to the request."""
        self._key = key
        self._requests: tuple[list[Request], ...] = tuple([] for _ in Place)
        self._key_of: dict[Request, tuple[Any, ...]] = {}
        """Keys as they were when requests were sorted in."""

    def __len__(self) -> int:
        return len(self._key_of)

    def count(self, place: Place) -> int:
        return len(self._requests[place])

    def num_waiting_before(self, request: Request) -> int:
        return self.num_waiting_below(self._key_of[request])

    def num_waiting_below(self, key: tuple[Any, ...]) -> int:
        """Return how many of the waiting come before a key."""
        return bisect_left(self._requests[Place.WAITING], key, key=self.rank)

    def advance(self, request: Request) -> None:
        """Do nothing: the order is that of the keys."""

    def rank(self, request: Request) -> tuple[Any, ...]:
        """Return the key under which it is queued now."""
        return self._key_of[request]

    def level_lengths(self) -> tuple[int, ...]:
        return (len(self),)

    def add(self, request: Request) -> None:
        self._insert(request, self._key(request))

    def _insert(self, request: Request, key: tuple[Any, ...]) -> None:
        self._key_of[request] = key
        queue = self._requests[request.place]
        queue.insert(bisect_left(queue, key, key=self._key_of.__getitem__), request)

    def remove(self, request: Request) -> None:
        queue = self._requests[request.place]
        del queue[bisect_left(queue, self._key_of[request], key=self._key_of.__getitem__)]
        del self._key_of[request]

    def put(self, request: Request, status: RequestStatus) -> None:
        self.remove(request)
        request.status = status
        self.add(request)

    def update(self, request: Request) -> None:
        key = self._key(request)
        if key != self._key_of[request]:
            self.remove(request)
            self._insert(request, key)

    def walk(self, place: Place) -> Iterator[Request]:
        return chain.from_iterable(forwards(self._requests[place]))

    def iter_reversed(self, place: Place) -> Iterator[Request]:
        return chain.from_iterable(backwards(self._requests[place]))

    def merged(
        self, places: Sequence[Place], limit: int, also: Sequence[Request] = ()
    ) -> Iterator[Request]:
        rank = self._key_of.__getitem__
        first = self._requests[Place.WAITING][:limit]
        if also and first:
            last = rank(first[-1])
            first += sorted((each for each in also if rank(each) > last), key=rank)
        few: Iterable[Sequence[Request]] = (first,)
        if Place.SWAPPED in places:
            few = runs(few, self._requests[Place.SWAPPED], rank)
        return chain.from_iterable(runs(few, self._requests[Place.RESIDENT], rank))


class LevelledQueues(SortedQueues):
    """Requests in the order of a key that begins with their level."""

    def __init__(
        self,
        key: Callable[[Request], tuple[Any, ...]],
        levels: int,
        on_placed: Callable[[Request], None],
    ) -> None:
        """Order by `key`; `on_placed` is told whose KV came somewhere or is gone."""
        super().__init__(key)
        self._levels = levels
        self._on_placed = on_placed

    def put(self, request: Request, status: RequestStatus) -> None:
        super().put(request, status)
        self._on_placed(request)

    def of_highest(self, place: Place) -> list[Request]:
        """Return those of a place that are on the highest level, the first first."""
        return self._requests[place][: bisect_left(self._requests[place], (1,), key=self.rank)]

    def level_lengths(self) -> tuple[int, ...]:
        def below(level: int) -> int:
            return sum(bisect_left(each, (level,), key=self.rank) for each in self._requests)

        return tuple(below(level + 1) - below(level) for level in range(self._levels))


def forwards(queue: list[T], start: int = 0, end: int | None = None) -> Iterator[list[T]]:
    """Walk a list that changes meanwhile, mostly behind the walk.

    In pieces: to copy all of a long list would take longer than the rest of a step.
    """
    end = len(queue) if end is None else end
    while piece := queue[start : min(start + _PIECE, end)]:
        yield piece
        start += _PIECE


def backwards(queue: list[T]) -> Iterator[list[T]]:
    """Yield the pieces of a queue from its end, each of them backwards."""
    end = len(queue)
    while end > 0:
        yield queue[max(end - _PIECE, 0) : end][::-1]
        end -= _PIECE


def runs(
    few: Iterable[Sequence[Request]], many: list[Request], rank: Callable[[Request], Any]
) -> Iterator[Sequence[Request]]:
    """Two orders as one, in runs: where one gives way to the other is searched by halves.

    Args:
        few: to be merged with the many, one run after the other.
        many: in their order; between two runs some may come and go.
        rank: what both are sorted by.
    """
    start = 0
    for run in few:
        done = 0
        while done < len(run):
            own_rank = rank(run[done])
            if (end := bisect_left(many, own_rank, key=rank)) > start:
                yield from forwards(many, start, end)
                end = bisect_left(many, own_rank, key=rank)
            begun, done = done, len(run)
            if end < len(many):
                done = bisect_left(run, rank(many[end]), begun + 1, key=rank)
            yield run[begun:done]
            start = bisect_left(many, rank(run[done - 1]), key=rank)
    yield from forwards(many, start)
