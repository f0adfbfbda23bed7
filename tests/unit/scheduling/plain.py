"""A scheduler without shortcuts: everything is looked at, and sorted anew, each time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, islice

from fastserve_mega.plan import Plan
from fastserve_mega.scheduling.events import Event
from fastserve_mega.scheduling.policies.level_queues import LevelQueues
from fastserve_mega.scheduling.policies.paced import Paced
from fastserve_mega.scheduling.policies.starvation import StarvationWatch
from fastserve_mega.scheduling.request import Place, Request, Turn
from fastserve_mega.scheduling.scheduler import Scheduler


def make_plain(scheduler: Scheduler) -> Scheduler:
    """Take the shortcuts out of a new scheduler; the plans must be the same.

    No request is only counted, each walk looks for the next request among all, victims are sought
    for every request that grows, and all pauses are looked at for one that has to end.
    """
    queues = scheduler._queues
    reclaimer = scheduler.memory.reclaimer
    is_beyond_reach = reclaimer._is_beyond_reach

    plan_step = scheduler.step

    def step(now: float, events: Sequence[Event] = ()) -> Plan | None:
        for request in scheduler._requests.values():
            request.steady_until = request.queue.steady_until = 0
        return plan_step(now, events)

    def at(place: Place) -> list[Request]:
        queued = (each for each in scheduler._requests.values() if each.turn is not Turn.HELD)
        return [each for each in queued if each.place is place]

    def walk(*places: Place, waiting: Sequence[Request] = ()) -> Iterator[Request]:
        """Those of some places as they are when the walk comes to them, and some that wait."""
        last = None
        while True:
            behind = [each for place in places for each in at(place)]
            behind += [each for each in waiting if each.place is Place.WAITING]
            behind = [each for each in behind if last is None or queues.rank(each) > last]
            if not behind:
                return
            request = min(behind, key=queues.rank)
            last = queues.rank(request)
            yield request

    def merged(
        places: Sequence[Place], limit: int, also: Sequence[Request] = ()
    ) -> Iterator[Request]:
        waiting = sorted(at(Place.WAITING), key=queues.rank)
        if isinstance(queues, LevelQueues):  # the first of each level
            levels = groupby(waiting, key=lambda each: each.queue.level)
            waiting = [each for _, those in levels for each in islice(those, limit)]
        else:
            waiting = waiting[:limit]
        return walk(*places[1:], waiting=[*waiting, *also])

    policy = scheduler._policy
    if isinstance(policy, Paced):
        _watch_without_heap(policy._pausing, scheduler)
    queues.walk = walk
    queues.merged = merged
    scheduler.step = step
    reclaimer._is_beyond_reach = lambda request, blocks: (
        request.place is not Place.RESIDENT and is_beyond_reach(request, blocks)
    )
    return scheduler


def _watch_without_heap(watch: StarvationWatch, scheduler: Scheduler) -> None:
    def pop(now: float, lead_s: float = 0.0) -> Request | None:
        watched = filter(watch.is_candidate, scheduler._requests.values())
        return next((each for each in watched if watch.deadline(each, now) <= now + lead_s), None)

    watch.pop = pop
