"""Ordered sets of requests, by where their KV is, that stay cheap at any length.

A step looks at the few requests it can do something with. So each place has an order of its own:
a hundred thousand waiting or swapped-out requests are not walked over on the way to those that run.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from operator import attrgetter
from typing import Any, Protocol

from fastserve_mega.scheduling.request import Place, Request, RequestStatus

_entry = attrgetter("queue.entry")
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
        return filter(None, map(self._by_key.get, _forwards(self._keys[place])))

    def iter_reversed(self, place: Place) -> Iterator[Request]:
        return filter(None, map(self._by_key.get, _backwards(self._keys[place])))

    def merged(self, places: Sequence[Place], limit: int) -> Iterator[Request]:
        waiting, *others = places
        keys: Iterator[tuple[Any, ...]] = iter(self._keys[waiting][:limit])
        for place in others:
            keys = _merge(keys, _forwards(self._keys[place]), key=None)
        return filter(None, map(self._by_key.get, keys))


class LevelQueues:
    """The levels of a multi-level feedback queue, first in first out within a level.

    A request keeps its place in its level while it runs and while its KV moves; one whose KV was
    dropped goes to the end. So those who wait join at the end only, and leave mostly at the front:
    an OrderedDict (a dict would leave holes that each later look at its front walks over). The
    others are few, and sorted lists.
    """

    def __init__(self, levels: int, on_placed: Callable[[Request], None]) -> None:
        """Make empty levels; `on_placed` is told whose KV came somewhere or is gone."""
        self._on_placed = on_placed
        self.lifted: set[Request] = set()
        """Those with KV on the highest level that were lifted to it."""
        self.lifted_waiting: set[Request] = set()
        """Those without."""
        self._waiting: list[OrderedDict[Request, None]] = [OrderedDict() for _ in range(levels)]
        self._sorted: tuple[list[list[Request]], ...] = tuple(
            [[] for _ in range(levels)] for _ in Place
        )
        """By place; that of the waiting stays empty."""
        self._lengths = [0] * levels
        self._entries = 0

    def __len__(self) -> int:
        return sum(self._lengths)

    def level_lengths(self) -> tuple[int, ...]:
        return tuple(self._lengths)

    def rank(self, request: Request) -> tuple[int, int]:
        return request.queue.level, request.queue.entry

    def count(self, place: Place) -> int:
        levels = self._waiting if place is Place.WAITING else self._sorted[place]
        return sum(map(len, levels))

    def add(self, request: Request, level: int = 0) -> None:
        """Put it at the end of a level."""
        self._entries += 1
        state = request.queue
        state.level = level
        state.entry = self._entries
        state.charged_s = 0.0
        self._lengths[level] += 1
        if request.place is Place.WAITING:
            self._waiting[level][request] = None
        else:
            self._sorted[request.place][level].append(request)

    def remove(self, request: Request) -> None:
        self._forget_lift(request)
        self._take_out(request)

    def move(self, request: Request, level: int) -> None:
        """Put it at the end of another level, or of its own."""
        self._forget_lift(request)
        self._take_out(request)
        self.add(request, level)

    def advance(self, request: Request) -> None:
        """Put it at the end of the highest level, as if it had just come."""
        self.move(request, 0)

    def lift(self, request: Request) -> None:
        """Put it at the end of the highest level, and remember that it did not come there."""
        self._take_out(request)
        self.add(request, 0)
        self._remember_lift(request)

    def _remember_lift(self, request: Request) -> None:
        is_waiting = request.place is Place.WAITING
        (self.lifted_waiting if is_waiting else self.lifted).add(request)

    def _forget_lift(self, request: Request) -> None:
        self.lifted.discard(request)
        self.lifted_waiting.discard(request)

    def _take_out(self, request: Request) -> None:
        level = request.queue.level
        self._lengths[level] -= 1
        if request.place is Place.WAITING:
            del self._waiting[level][request]
        else:
            queue = self._sorted[request.place][level]
            # Who runs is often the first, who is preempted the last.
            if queue[-1] is request:
                queue.pop()
            elif queue[0] is request:
                del queue[0]
            else:
                del queue[bisect_left(queue, request.queue.entry, key=_entry)]

    def update(self, request: Request) -> None:
        """Do nothing: running changes no level, a demotion does (`move`)."""

    def put(self, request: Request, status: RequestStatus) -> None:
        """Keep its place in its level, except that one whose KV was dropped goes to the end."""
        self._take_out(request)
        was_lifted = request in self.lifted or request in self.lifted_waiting
        request.status = status
        if was_lifted:
            self._forget_lift(request)
            self._remember_lift(request)
        self._insert(request)
        self._on_placed(request)

    def _insert(self, request: Request) -> None:
        state, place = request.queue, request.place
        if place is Place.WAITING:
            charged_s = state.charged_s
            self.add(request, state.level)
            state.charged_s = charged_s
            return
        self._lengths[state.level] += 1
        queue = self._sorted[place][state.level]
        if not queue or queue[-1].queue.entry < state.entry:
            queue.append(request)
        else:
            insort(queue, request, key=_entry)

    def walk(self, place: Place) -> Iterator[Request]:
        if place is Place.WAITING:
            return chain.from_iterable(map(tuple, self._waiting))
        return chain.from_iterable(map(_forwards, self._sorted[place]))

    def iter_reversed(self, place: Place) -> Iterator[Request]:
        return chain.from_iterable(map(_backwards, reversed(self._sorted[place])))

    def merged(self, places: Sequence[Place], limit: int) -> Iterator[Request]:
        """Iterate over several places, with the first `limit` of each level of the waiting."""
        _, *others = places
        for level, waiting in enumerate(self._waiting):
            requests = iter(tuple(islice(waiting, limit)))
            for place in others:
                if queue := self._sorted[place][level]:
                    requests = _merge(requests, _forwards(queue), key=_entry)
            yield from requests


def _forwards(queue: list[Any]) -> Iterator[Any]:
    """Walk a list that changes meanwhile, mostly behind the walk.

    In pieces: to copy all of a long list would take longer than the rest of a step.
    """
    start = 0
    while piece := queue[start : start + _PIECE]:
        yield from piece
        start += _PIECE


def _backwards(queue: list[Any]) -> Iterator[Any]:
    """The same from its end."""
    end = len(queue)
    while end > 0:
        piece = queue[max(end - _PIECE, 0) : end]
        yield from reversed(piece)
        end -= _PIECE


def _merge(
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
