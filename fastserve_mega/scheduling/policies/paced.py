"""Pacing: every reader is served in time, and what is left over goes by the work to be done."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from fastserve_mega.scheduling.cost_model import CostModel
from fastserve_mega.scheduling.policies.policy import Policy
from fastserve_mega.scheduling.policies.queues import LevelledQueues
from fastserve_mega.scheduling.policies.readers import Readers, Standing
from fastserve_mega.scheduling.policies.starvation import StarvationWatch
from fastserve_mega.scheduling.policies.triage import Triage
from fastserve_mega.scheduling.request import Place, Request, RequestStatus
from fastserve_mega.system.config import SchedulerConfig

_LEAD = 1.5
"""A deadline is near when it is fewer steps away than this."""
_MUCH = 2.0
"""Who makes more work by this factor is passed by a newcomer."""
_LEAST_LATE = 0.1
"""Who cannot be in time gets this share of the starts at least: that of the starved."""
_NOT_STARTED_S = 1e6
"""Estimated time until a request runs that there is no place for."""


class Paced(Policy):
    """Serves each reader as fast as it reads, and finishes what is least work with the rest.

    An answer ahead of its reader may pause at no cost to anybody, and one that is about to fall
    behind is urgent. Levels, the highest first:

    1. urgent: new requests and answers whose deadline is near, by deadline;
    2. ahead: the other answers, by the expected rest of their work;
    3. late: who cannot be in time any more (`Triage`), by expected work.
    """

    makes_way = True

    level_names = tuple(each.name.lower() for each in Standing)

    def __init__(self, config: SchedulerConfig, cost_model: CostModel) -> None:
        super().__init__(config, cost_model)
        self.queues: LevelledQueues = LevelledQueues(self.key, len(Standing), self._placed)
        self._readers = Readers(config, cost_model)
        self._triage = Triage(config, self._readers, self.queues, self._set_standing)
        self._pausing = _Pauses(self._readers)
        self._ran: deque[tuple[float, Sequence[Request]]] = deque()
        """Batches, and when they had run, of which nobody has paused yet."""

    def key(self, request: Request) -> tuple[Any, ...]:
        level, number = request.queue.level, request.arrival_number
        if level == Standing.URGENT:
            return level, self._readers.due_s(request), number
        # The background goes by arrival: it never starves, so nobody in it may be passed for ever.
        cost_s = 0.0 if request.is_background else self._readers[request].cost_s
        return level, request.priority, cost_s, number

    def add(self, request: Request, now: float) -> None:
        self._readers.add(request, now)
        request.queue.level = Standing.LATE
        self.queues.add(request)
        if not request.is_background:  # nobody reads that
            self._triage.add(request)

    def remove(self, request: Request) -> None:
        self.queues.remove(request)
        self._triage.remove(request, self._readers.remove(request))

    def charge(self, batch: Sequence[Request], elapsed_s: float) -> None:
        if not batch:
            return
        readers, now = self._readers, batch[0].waiting_since
        readers.observe_step(now, elapsed_s)
        near_s = now + _LEAD * readers.interval_s
        self._ran.append((now, batch))
        for request in batch:
            if request.num_tokens < request.queue.steady_until or request.is_background:
                continue
            reader = readers[request]
            if request.num_pending_tokens > 1:  # its prefill goes on
                work_s, reader.work_s = reader.work_s, readers.work_s(request)
                self._triage.read_on(request, work_s - reader.work_s, now)
                if request.queue.level == Standing.LATE:
                    self.queues.update(request)
                continue
            if not reader.has_begun:
                readers.began(request, now)
                request.queue.level = Standing.URGENT
                self._triage.began(request, now)
            if readers.aged(request):
                self._triage.resized(request)
            if request.queue.level == Standing.URGENT:
                readers.served(request, now)
                if readers.next_s(request) > near_s:
                    is_late = reader.is_given_up
                    request.queue.level = Standing.LATE if is_late else Standing.AHEAD
                    self._pausing.add(request, len(self.queues))
            if request.queue.level != Standing.URGENT:  # the order of the urgent changes each time
                request.queue.steady_until = readers.ages_at(request)
            self.queues.update(request)

    def promote(self, now: float) -> None:
        """Make urgent whose deadline has come near, and choose whom to start."""
        while self._ran and self._ran[0][0] < now:
            ran_at, batch = self._ran.popleft()
            for request in batch:
                if request.waiting_since == ran_at and not request.num_scheduled_tokens:
                    self._watch_pause(request)
        lead_s = _LEAD * self._readers.interval_s
        while (due := self._pausing.pop(now, lead_s)) is not None:
            self._set_standing(due, Standing.URGENT)
        self._triage.choose(now)

    def next_deadline(self, now: float) -> float | None:
        deadlines = (self._pausing.next_deadline(now), self._triage.next_deadline(now))
        return min((each for each in deadlines if each is not None), default=None)

    def expected_wait_s(self, request: Request, pace_s: float) -> float:
        # Estimates drift, so what is about as much work is taken in turn and not pushed aside.
        longer_s = _MUCH * self._readers[request].cost_s
        ahead = self._triage.num_in_time_before(request, longer_s)
        if ahead is not None and pace_s * (ahead + 1) <= self.config.paced.ttft_s:
            return pace_s * (ahead + 1) if ahead else 0.0
        below = self.queues.num_waiting_below((Standing.LATE, request.priority, longer_s))
        return pace_s * (below - 1) / max(self._triage.late_share, _LEAST_LATE)

    def enst(self, now: float) -> Callable[[Request], float]:
        """Return what estimates the time until a request runs: until it has to."""

        def until_urgent_s(request: Request) -> float:
            if request.queue.level == Standing.URGENT:
                return 0.0
            if not self._readers[request].has_begun:
                return _NOT_STARTED_S
            return max(self._readers.wanted_s(request) - now, 0.0)

        return until_urgent_s

    def _set_standing(self, request: Request, standing: Standing) -> None:
        if request.queue.level == standing:
            return
        request.queue.level = standing
        self.queues.update(request)
        self._watch_pause(request)

    def _placed(self, request: Request) -> None:
        """Take in that the KV of a request has just come somewhere or gone."""
        count = self.queues.count
        self._readers.placed(request, count(Place.SWAPPED), count(Place.RESIDENT))
        self._watch_pause(request)

    def _watch_pause(self, request: Request) -> None:
        """Watch an answer that may pause now."""
        request.queue.steady_until = 0
        if self._pausing.is_candidate(request):
            self._pausing.add(request, len(self.queues))


class _Pauses(StarvationWatch):
    """The answers that may pause, by when they have to go on."""

    def __init__(self, readers: Readers) -> None:
        super().__init__(
            lambda request: readers.due_s(request) - request.waiting_since,
            lambda request: self.deadline(request, 0.0) is not None,
        )
        self._readers = readers

    def deadline(self, request: Request, now: float) -> float | None:
        if request.status is RequestStatus.FINISHED or request.queue.level == Standing.URGENT:
            return None
        return self._readers.pause_ends_s(request, now)
