"""The levels of a multi-level feedback queue."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from operator import attrgetter

from fastserve_mega.scheduling.policies.queues import backwards, forwards, runs
from fastserve_mega.scheduling.request import Place, Request, RequestStatus

_entry = attrgetter("queue.entry")


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
        """Requests with KV on the highest level that were lifted to it."""
        self.lifted_waiting: set[Request] = set()
        """Requests without KV there."""
        self._waiting: list[OrderedDict[Request, None]] = [OrderedDict() for _ in range(levels)]
        self._sorted: tuple[list[list[Request]], ...] = tuple(
            [[] for _ in range(levels)] for _ in Place
        )
        """By place; that of the waiting stays empty."""
        self._lengths = [0] * levels
        self._counts = [0] * len(Place)
        self._entries = 0

    def __len__(self) -> int:
        return sum(self._counts)

    def level_lengths(self) -> tuple[int, ...]:
        return tuple(self._lengths)

    def rank(self, request: Request) -> tuple[int, int]:
        return request.queue.level, request.queue.entry

    def count(self, place: Place) -> int:
        return self._counts[place]

    def num_waiting_before(self, request: Request) -> int:
        return sum(map(len, self._waiting[: request.queue.level + 1])) - 1

    def add(self, request: Request, level: int = 0) -> None:
        """Put it at the end of a level."""
        self._entries += 1
        state = request.queue
        state.level = level
        state.entry = self._entries
        state.charged_s = 0.0
        self._lengths[level] += 1
        place = request.place
        self._counts[place] += 1
        if place is Place.WAITING:
            self._waiting[level][request] = None
        else:
            self._sorted[place][level].append(request)

    def remove(self, request: Request) -> None:
        self._forget_lift(request)
        self._take_out(request)

    def move(self, request: Request, level: int) -> None:
        """Put it at the end of another level, or of its own."""
        if not request.queue.level:
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
        level, place = request.queue.level, request.place
        self._lengths[level] -= 1
        self._counts[place] -= 1
        if place is Place.WAITING:
            del self._waiting[level][request]
        else:
            queue = self._sorted[place][level]
            # Who runs is often the first, who is preempted the last.
            if queue[-1] is request:
                queue.pop()
            elif queue[0] is request:
                del queue[0]
            else:
                del queue[_index(queue, request)]

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
        self._counts[place] += 1
        queue = self._sorted[place][state.level]
        queue.insert(_index(queue, request), request)

    def walk(self, place: Place) -> Iterator[Request]:
        if place is Place.WAITING:
            return chain.from_iterable(map(tuple, self._waiting))
        pieces = chain.from_iterable(map(forwards, self._sorted[place]))
        return chain.from_iterable(pieces)

    def iter_reversed(self, place: Place) -> Iterator[Request]:
        pieces = chain.from_iterable(map(backwards, reversed(self._sorted[place])))
        return chain.from_iterable(pieces)

    def merged(
        self, places: Sequence[Place], limit: int, also: Sequence[Request] = ()
    ) -> Iterator[Request]:
        """Iterate over several places, with the first `limit` of each level of the waiting."""
        return chain.from_iterable(self._runs(limit, also, with_swapped=Place.SWAPPED in places))

    def _runs(
        self, limit: int, also: Sequence[Request], *, with_swapped: bool
    ) -> Iterator[Sequence[Request]]:
        for level, waiting in enumerate(self._waiting):
            first = list(islice(waiting, limit))
            if also and limit < len(waiting):
                last = _entry(first[-1])
                behind = (r for r in also if r.queue.level == level and r.queue.entry > last)
                first += sorted(behind, key=_entry)
            few: Iterable[Sequence[Request]] = (first,)
            if with_swapped:
                few = runs(few, self._sorted[Place.SWAPPED][level], _entry)
            yield from runs(few, self._sorted[Place.RESIDENT][level], _entry)


def _index(queue: list[Request], request: Request) -> int:
    """Where a request stands in a sorted level, or would stand."""
    if not queue or queue[-1].queue.entry < request.queue.entry:
        return len(queue)
    return bisect_left(queue, request.queue.entry, key=_entry)
