"""The multi-level feedback queue, with the paper's skip-join (section 4.1) or without."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import islice

from fastserve_mega.scheduling.cost_model import CostModel
from fastserve_mega.scheduling.queues import LevelQueues
from fastserve_mega.scheduling.request import Place, Request
from fastserve_mega.system.config import MlfqConfig

_Watched = tuple[float, int, Request]
"""Deadline, arrival number, request."""
_FEW = 16


class Mlfq:
    """Levels Q1 (index 0, highest) to Qn with growing quanta; first in, first out within a level.

    A request is charged the time of the steps it takes part in and demoted when it has used up
    the quantum of its level. One that waited for `starvation_limit_s` since it last ran, or since
    it arrived, returns to Q1, up to a batch of them at a time.

    With `skip_join`, a request joins the highest level whose quantum holds its prefill, and a
    demoted one skips the levels whose quantum could not hold its next iteration. Without, all
    join at Q1 and are demoted one level at a time: the naive MLFQ of the paper's comparison.
    """

    def __init__(
        self, config: MlfqConfig, cost_model: CostModel, *, skip_join: bool, max_batch_size: int
    ) -> None:
        base_s = config.base_quantum_s or cost_model.decode_s(1, 1)
        self.quanta_s = [base_s * config.quantum_ratio**level for level in range(config.levels)]
        self._lowest = config.levels - 1
        self._cost_model = cost_model
        self._skip_join = skip_join
        self._max_batch_size = max_batch_size
        self._starvation_limit_s = config.starvation_limit_s
        self._queues = LevelQueues(config.levels)
        self.walk = self._queues.walk
        self.walk_back = self._queues.walk_back
        self.merged = self._queues.merged
        self.count = self._queues.count
        self._watch: list[_Watched] = []
        """Heap of (deadline, arrival number, request). A deadline is corrected when it is looked
        at, not when the request runs: one heap operation per starvation limit, not per step."""
        self._promoted: set[Request] = set()
        """Lifted to Q1 and still there."""
        self._hosted_watch: list[_Watched] = []
        """The same for those on the host, who do not run and so keep their deadlines."""

    def add(self, request: Request, now: float) -> None:
        request.waiting_since = now
        level = self._level_that_holds(self._next_iteration_s(request)) if self._skip_join else 0
        level = min(max(level + request.priority, 0), self._lowest)
        self._queues.add(request, level)
        self._watch_starvation(request)

    def remove(self, request: Request) -> None:
        self._queues.remove(request)
        self._promoted.discard(request)

    def put(self, request: Request, place: Place) -> None:
        self._queues.put(request, place)
        if place is Place.HOSTED and self._starvation_limit_s is not None:
            entry = (self._deadline(request), request.arrival_number, request)
            heapq.heappush(self._hosted_watch, entry)
            _prune(self._hosted_watch, self.count(Place.HOSTED), self._is_hosted_until)

    def charge(self, batch: Sequence[Request], elapsed_s: float) -> None:
        quanta_s = self.quanta_s
        used_up = []
        for request in batch:
            request.charged_s += elapsed_s
            # A prefill is one iteration (paper section 4.1), however many chunks it is cut into:
            # what it used up counts when it is done. Else half-read prompts would queue behind
            # each other with the blocks of the whole prompt in their hands.
            if request.charged_s >= quanta_s[request.level] and request.pending_tokens == 1:
                used_up.append(request)
        if used_up:
            # One prediction for the longest context, instead of one for each.
            longest = max(request.known_tokens for request in used_up)
            decode_s = self._cost_model.decode_s(1, longest)
            for request in used_up:
                self._demote(request, decode_s)

    def promote(self, now: float) -> None:
        """Find the starving by their deadlines; each is O(log n).

        No more than a batch of them at a time: under overload everybody starves, and with all of
        them in Q1 the levels would be worth nothing.
        """
        watch = self._watch
        while watch and watch[0][0] <= now and self._may_promote():
            _, _, request = watch[0]
            if request.ended or request.level == 0:
                heapq.heappop(watch)
                request.watched = False
            elif (deadline := self._starvation_deadline(request, now)) > now:
                heapq.heapreplace(watch, (deadline, request.arrival_number, request))
            else:
                heapq.heappop(watch)
                request.watched = False
                self._promoted.add(request)
                self._queues.move(request, 0)

    def next_deadline(self, now: float) -> float | None:
        if not self._may_promote():
            return None  # before a step has made room there is nothing to do
        watch = self._watch
        while watch:
            deadline, _, request = watch[0]
            if request.ended or request.level == 0:
                heapq.heappop(watch)
                request.watched = False
                continue
            corrected = self._starvation_deadline(request, now)
            if corrected <= deadline:
                return deadline
            heapq.heapreplace(watch, (corrected, request.arrival_number, request))
        return None

    def rank(self, request: Request) -> tuple[int, int]:
        return request.level, request.level_entry

    def scheduled_in_s(self, request: Request, now: float) -> float:
        return self._enst(now)(request)[0]

    def soonest_hosted(self, now: float, count: int) -> list[Request]:
        enst = self._enst(now)
        first = list(islice(self.walk(Place.HOSTED), count))
        if len(first) < count:
            return sorted(first, key=enst)
        until_s = enst(first[-1])[0]
        promoted = self._first_promoted(now + until_s, count)
        return sorted({*first, *promoted}, key=enst)[:count]

    def latest_residents(self, now: float, count: int) -> list[Request]:
        last = islice(self.walk_back(Place.RESIDENT), count)
        return sorted(last, key=self._enst(now), reverse=True)

    def level_lengths(self) -> tuple[int, ...]:
        return self._queues.lengths

    def level_quanta_s(self) -> tuple[float, ...]:
        return tuple(self.quanta_s)

    def _enst(self, now: float) -> Callable[[Request], tuple[float, int, int]]:
        """Sort by ENST (paper section 4.2): the sooner of promotion and execution.

        T_promote is the time left until the starvation promotion, and counts only while there may
        be another: those who are overdue but cannot be promoted would else return to the device
        before the promoted, find no place in a batch, and keep the promoted out. T_execute is the
        time until all requests of higher levels have come down to the level of this one, which is
        the sum of the quanta on their way, shared by a batch.
        """
        execute_s = [0.0]
        work_s, above = 0.0, 0
        for length, quantum_s in zip(self._queues.lengths, self.quanta_s, strict=True):
            above += length
            work_s += above * quantum_s
            execute_s.append(work_s / self._max_batch_size)
        limit_s = self._starvation_limit_s
        if limit_s is None or not self._may_promote():
            return lambda request: (execute_s[request.level], request.level, request.level_entry)

        promoted_in_s = limit_s - now

        def enst(request: Request) -> tuple[float, int, int]:
            level = request.level
            until_s = execute_s[level]
            if level and (promoted_s := request.waiting_since + promoted_in_s) < until_s:
                until_s = max(promoted_s, 0.0)
            return until_s, level, request.level_entry

        return enst

    def _may_promote(self) -> bool:
        return len(self._promoted) < self._max_batch_size

    def _first_promoted(self, until: float, count: int) -> list[Request]:
        """Of those on the host, up to `count` whose promotion comes first, and before `until`."""
        watch = self._hosted_watch
        valid: list[_Watched] = []
        while watch and watch[0][0] < until and len(valid) < count:
            entry = heapq.heappop(watch)
            if self._is_hosted_until(entry):
                valid.append(entry)
        for entry in valid:
            heapq.heappush(watch, entry)
        return [request for _, _, request in valid]

    def _is_hosted_until(self, entry: _Watched) -> bool:
        """Whether it says when somebody on the host will be promoted."""
        deadline, _, request = entry
        is_hosted = request.place is Place.HOSTED and not request.ended
        return is_hosted and request.level > 0 and deadline == self._deadline(request)

    def _demote(self, request: Request, decode_s: float) -> None:
        """Move it down; `decode_s` is at least the time of its next iteration if it decodes."""
        level = min(request.level + 1, self._lowest)
        decodes_in_time = request.pending_tokens == 1 and decode_s <= self.quanta_s[level]
        if self._skip_join and not decodes_in_time:
            level = max(level, self._level_that_holds(self._next_iteration_s(request)))
        self._queues.move(request, level)
        self._promoted.discard(request)
        self._watch_starvation(request)

    def _level_that_holds(self, seconds: float) -> int:
        """The highest level whose quantum is at least this long, else the lowest level."""
        return min(bisect_left(self.quanta_s, seconds), self._lowest)

    def _next_iteration_s(self, request: Request) -> float:
        pending = request.pending_tokens
        if not request.computed_tokens:
            pending -= request.cached_tokens
        if pending > 1:
            return self._cost_model.prefill_s(pending)
        return self._cost_model.decode_s(1, request.known_tokens)

    def _watch_starvation(self, request: Request) -> None:
        if self._starvation_limit_s is not None and request.level > 0 and not request.watched:
            request.watched = True
            entry = (self._deadline(request), request.arrival_number, request)
            heapq.heappush(self._watch, entry)
            _prune(self._watch, len(self._queues), _is_watched)

    def _starvation_deadline(self, request: Request, now: float) -> float:
        if request.in_flight_tokens:
            return now + (self._starvation_limit_s or 0.0)
        return self._deadline(request)

    def _deadline(self, request: Request) -> float:
        """When it is promoted unless it runs before."""
        return request.waiting_since + (self._starvation_limit_s or 0.0)


def _is_watched(entry: _Watched) -> bool:
    _, _, request = entry
    request.watched = not request.ended and request.level > 0
    return request.watched


def _prune(watch: list[_Watched], live: int, is_valid: Callable[[_Watched], bool]) -> None:
    """Forget what is out of date in a heap when it is more than half: O(1) for each push."""
    if len(watch) > 2 * live + _FEW:
        watch[:] = filter(is_valid, watch)
        heapq.heapify(watch)
