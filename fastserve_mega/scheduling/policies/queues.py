"""Ordered sets of requests, by where their KV is, that stay cheap at any length.

A step looks at the few requests it can do something with. So each place has an order of its own:
a hundred thousand waiting or swapped-out requests are not walked over on the way to those that run.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from fastserve_mega.scheduling.request import Place, Request, RequestStatus

_PIECE = 512


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

    def merged(self, places: Sequence[Place], limit: int) -> Iterator[Request]:
        """Iterate over several places as one.

        Args:
            places: the waiting first.
            limit: so many of the waiting are enough, a step admits but a few.
        """

    def count(self, place: Place) -> int:
        """Return how many requests a place has."""

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
        self._keys: tuple[list[tuple[Any, ...]], ...] = tuple([] for _ in Place)
        self._by_key: dict[tuple[Any, ...], Request] = {}
        self._key_of: dict[Request, tuple[Any, ...]] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def count(self, place: Place) -> int:
        return len(self._keys[place])

    def advance(self, request: Request) -> None:
        """Do nothing: the order is that of the keys."""

    def rank(self, request: Request) -> tuple[Any, ...]:
        """Return the key under which it is queued now."""
        return self._key_of[request]

    def level_lengths(self) -> tuple[int, ...]:
        return (len(self._by_key),)

    def add(self, request: Request) -> None:
        key = self._key(request)
        insort(self._keys[request.place], key)
        self._by_key[key] = request
        self._key_of[request] = key

    def remove(self, request: Request) -> None:
        key = self._key_of.pop(request)
        del self._by_key[key]
        keys = self._keys[request.place]
        del keys[bisect_left(keys, key)]

    def put(self, request: Request, status: RequestStatus) -> None:
        self.remove(request)
        request.status = status
        self.add(request)

    def update(self, request: Request) -> None:
        if self._key(request) != self._key_of[request]:
            self.remove(request)
            self.add(request)

    def walk(self, place: Place) -> Iterator[Request]:
        """Iterate over a place; a request whose key changes meanwhile is left out."""
        return filter(None, map(self._by_key.get, forwards(self._keys[place])))

    def iter_reversed(self, place: Place) -> Iterator[Request]:
        return filter(None, map(self._by_key.get, backwards(self._keys[place])))

    def merged(self, places: Sequence[Place], limit: int) -> Iterator[Request]:
        waiting, *others = places
        keys: Iterator[tuple[Any, ...]] = iter(self._keys[waiting][:limit])
        for place in others:
            keys = merge(keys, forwards(self._keys[place]), key=None)
        return filter(None, map(self._by_key.get, keys))


def forwards(queue: list[Any]) -> Iterator[Any]:
    """Walk a list that changes meanwhile, mostly behind the walk.

    In pieces: to copy all of a long list would take longer than the rest of a step.
    """
    start = 0
    while piece := queue[start : start + _PIECE]:
        yield from piece
        start += _PIECE


def backwards(queue: list[Any]) -> Iterator[Any]:
    """The same from its end."""
    end = len(queue)
    while end > 0:
        piece = queue[max(end - _PIECE, 0) : end]
        yield from reversed(piece)
        end -= _PIECE


def merge(
    first: Iterator[Any], second: Iterator[Any], key: Callable[[Any], Any] | None
) -> Iterator[Any]:
    """Two sorted sequences as one; quicker than heapq.merge where one of them is empty."""
    head = next(first, None)
    if head is None:
        yield from second
        return
    for item in second:
        value = key(item) if key else item
        while head is not None and (key(head) if key else head) < value:
            yield head
            head = next(first, None)
        yield item
    if head is not None:
        yield head
        yield from first
