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
from typing import Any

from fastserve_mega.scheduling.request import Place, Request

_level_entry = attrgetter("level_entry")
_PIECE = 512


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

    def key(self, request: Request) -> tuple[Any, ...]:
        """The key under which it is queued now."""
        return self._key_of[request]

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

    def put(self, request: Request, place: Place) -> None:
        """Its KV is somewhere else now."""
        self.remove(request)
        request.place = place
        self.add(request)

    def update(self, request: Request) -> None:
        """Sort it in again when its key has changed."""
        if self._key(request) != self._key_of[request]:
            self.remove(request)
            self.add(request)

    def walk(self, place: Place) -> Iterator[Request]:
        """The first one first; whose key changes meanwhile is left out."""
        return filter(None, map(self._by_key.get, _forwards(self._keys[place])))

    def walk_back(self, place: Place) -> Iterator[Request]:
        """The last one first."""
        return filter(None, map(self._by_key.get, _backwards(self._keys[place])))

    def merged(self, places: Sequence[Place], limit: int) -> Iterator[Request]:
        """Several places as one, with the first `limit` of each.

        The waiting are the first of `places`: a step admits but a few of them.
        """
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

    def __init__(self, levels: int) -> None:
        self._waiting: list[OrderedDict[Request, None]] = [OrderedDict() for _ in range(levels)]
        self._sorted: dict[Place, list[list[Request]]] = {
            place: [[] for _ in range(levels)] for place in (Place.RESIDENT, Place.HOSTED)
        }
        self._lengths = [0] * levels
        self._entries = 0

    def __len__(self) -> int:
        return sum(self._lengths)

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(self._lengths)

    def count(self, place: Place) -> int:
        levels = self._waiting if place is Place.WAITING else self._sorted[place]
        return sum(map(len, levels))

    def add(self, request: Request, level: int) -> None:
        """Put it at the end of a level."""
        self._entries += 1
        request.level = level
        request.level_entry = self._entries
        request.charged_s = 0.0
        self._lengths[level] += 1
        if request.place is Place.WAITING:
            self._waiting[level][request] = None
        else:
            self._sorted[request.place][level].append(request)

    def remove(self, request: Request) -> None:
        level = request.level
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
                del queue[bisect_left(queue, request.level_entry, key=_level_entry)]

    def move(self, request: Request, level: int) -> None:
        """Put it at the end of another level, or of its own."""
        self.remove(request)
        self.add(request, level)

    def put(self, request: Request, place: Place) -> None:
        """Its KV is somewhere else now, or gone."""
        self.remove(request)
        request.place = place
        if place is Place.WAITING:
            charged_s = request.charged_s
            self.add(request, request.level)
            request.charged_s = charged_s
        else:
            self._lengths[request.level] += 1
            queue = self._sorted[place][request.level]
            if not queue or queue[-1].level_entry < request.level_entry:
                queue.append(request)
            else:
                insort(queue, request, key=_level_entry)

    def walk(self, place: Place) -> Iterator[Request]:
        """The first one first."""
        if place is Place.WAITING:
            return chain.from_iterable(map(tuple, self._waiting))
        return chain.from_iterable(map(_forwards, self._sorted[place]))

    def walk_back(self, place: Place) -> Iterator[Request]:
        """The last one first; of those who have KV."""
        return chain.from_iterable(map(_backwards, reversed(self._sorted[place])))

    def merged(self, places: Sequence[Place], limit: int) -> Iterator[Request]:
        """Several places as one, with the first `limit` of each level of the waiting.

        The waiting are the first of `places`: a step admits but a few of them.
        """
        _, *others = places
        for level, waiting in enumerate(self._waiting):
            requests = iter(tuple(islice(waiting, limit)))
            for place in others:
                if queue := self._sorted[place][level]:
                    requests = _merge(requests, _forwards(queue), key=_level_entry)
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
