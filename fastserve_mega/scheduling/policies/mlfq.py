"""The multi-level feedback queue, with the paper's skip-join (section 4.1) or without."""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate, islice
from typing import ClassVar

from fastserve_mega.scheduling.cost_model import CostModel
from fastserve_mega.scheduling.policies.level_queues import LevelQueues
from fastserve_mega.scheduling.policies.policy import Policy
from fastserve_mega.scheduling.policies.sessions import Sessions
from fastserve_mega.scheduling.policies.starvation import StarvationWatch
from fastserve_mega.scheduling.request import Place, Request
from fastserve_mega.system.config import SchedulerConfig

_Watched = tuple[float, int, Request]
"""Deadline, arrival number, request."""
_FEW = 16


class Mlfq(Policy):
    """Levels Q1 (index 0, highest) to Qn with growing quanta; first in, first out within a level.

    A request is charged the time of the steps it takes part in and demoted when it has used up
    the quantum of its level. One that waited for `starvation_limit_s` since it last ran, or since
    it arrived, returns to Q1, up to a batch of them at a time. Each step of `priority` below
    normal makes a request join one level lower, and wait `quantum_ratio` times as long for that.
    A request of a session joins and comes down as one would that was served as much as the session.

    All join at Q1 and are demoted one level at a time: the naive MLFQ of the paper's comparison.
    """

    skip_join: ClassVar[bool] = False

    def __init__(self, config: SchedulerConfig, cost_model: CostModel) -> None:
        super().__init__(config, cost_model)
        mlfq = config.mlfq
        base_s = mlfq.base_quantum_s or cost_model.decode_s(1, 1)
        self.level_quanta_s = tuple(
            base_s * mlfq.quantum_ratio**level for level in range(mlfq.levels)
        )
        self._lowest = mlfq.levels - 1
        self._served_s = tuple(accumulate(self.level_quanta_s))
        """The service after which a request has left each level."""
        self._sessions = Sessions()
        self._max_batch_size = config.max_batch_size
        self._starvation_limit_s = mlfq.starvation_limit_s
        self.queues: LevelQueues = LevelQueues(mlfq.levels, self._watch_placed)
        self._waiting_watch: StarvationWatch | None = None
        self._started_watch: StarvationWatch | None = None
        if mlfq.starvation_limit_s is not None:
            self._waiting_watch = StarvationWatch(self._patience_s, _waits_without_kv)
            self._started_watch = StarvationWatch(self._limit_s, _waits_with_kv)
        self._swapped_watch: list[_Watched] = []
        """Heap of (deadline, arrival number, request) of the swapped: these do not run and so keep
        their deadlines."""

    def key(self, request: Request) -> tuple[int, int]:
        return self.queues.rank(request)

    def line_key(self, request: Request) -> tuple[float, int]:
        """Sort by when they would starve: so it is with those that wait in the queue for long."""
        return request.offered_at + self._patience_s(request), request.arrival_number

    def add(self, request: Request, now: float) -> None:
        level = self._level_that_holds(self._next_iteration_s(request)) if self.skip_join else 0
        level = max(level, self._level_of_session(request, now))
        level = min(max(level + request.priority, 0), self._lowest)
        self.queues.add(request, level)
        self._watch_starvation(request)

    def remove(self, request: Request) -> None:
        self._count_for_session(request)
        super().remove(request)

    def charge(self, batch: Sequence[Request], elapsed_s: float) -> None:
        quanta_s = self.level_quanta_s
        used_up = []
        for request in batch:
            state = request.queue
            state.charged_s = charged_s = state.charged_s + elapsed_s
            # A prefill is one iteration (paper section 4.1), however many chunks it is cut into:
            # what it used up counts when it is done. Else half-read prompts would queue behind
            # each other with the blocks of the whole prompt in their hands.
            if charged_s >= quanta_s[state.level] and request.num_pending_tokens == 1:
                used_up.append(request)
        if used_up:
            # One prediction for the longest context, instead of one for each.
            longest = max(request.num_tokens for request in used_up)
            decode_s = self.cost_model.decode_s(1, longest)
            for request in used_up:
                self._demote(request, decode_s)

    def promote(self, now: float) -> None:
        """Find the starving by their deadlines; each is O(log n).

        No more than a batch of them at a time: under overload everybody starves, and with all of
        them in Q1 the levels would be worth nothing. Those without KV are counted apart: they keep
        their place in Q1 while there is no memory for them, and must not keep out those with KV;
        nor these them, or who began low for its prompt would wait for its first token until no
        other starves.
        """
        for watch in self._open_watches():
            while watch in self._open_watches() and (request := watch.pop(now)):
                self._count_for_session(request)
                self.queues.lift(request)

    def next_deadline(self, now: float) -> float | None:
        # Before a step has made room in a full Q1 there is nothing to do.
        deadlines = [watch.next_deadline(now) for watch in self._open_watches()]
        return min((each for each in deadlines if each is not None), default=None)

    def enst(self, now: float) -> Callable[[Request], float]:
        """Return what estimates the time until a request runs (paper section 4.2).

        It is the sooner of promotion and execution.

        T_promote is the time left until the starvation promotion, and counts only while there may
        be another: those who are overdue but cannot be promoted would else return to the device
        before the promoted, find no place in a batch, and keep the promoted out. T_execute is the
        time until all requests of higher levels have come down to the level of this one, which is
        the sum of the quanta on their way, shared by a batch.
        """
        execute_s = [0.0]
        work_s, above = 0.0, 0
        for length, quantum_s in zip(self.queues.level_lengths(), self.level_quanta_s, strict=True):
            above += length
            work_s += above * quantum_s
            execute_s.append(work_s / self._max_batch_size)
        limit_s = self._starvation_limit_s
        if limit_s is None or not self._may_promote():
            return lambda request: execute_s[request.queue.level]

        promoted_in_s = limit_s - now

        def sooner_s(request: Request) -> float:
            level = request.queue.level
            until_s = execute_s[level]
            if level and (promoted_s := request.waiting_since + promoted_in_s) < until_s:
                if request.priority > 0:
                    promoted_s += self._limit_s(request) - limit_s
                until_s = min(max(promoted_s, 0.0), until_s)
            return until_s

        return sooner_s

    def soonest_swapped(self, now: float, count: int) -> list[Request]:
        """Look at the first of the queue, and at those whose promotion comes before them."""
        enst, rank = self.enst(now), self.queues.rank
        first = list(islice(self.queues.walk(Place.SWAPPED), count))
        if len(first) == count and self._may_promote():
            until_s = enst(first[-1])
            first = list({*first, *self._first_promoted(now + until_s, count)})
        return sorted(first, key=lambda request: (enst(request), rank(request)))[:count]

    # --- starvation ------------------------------------------------------------------------------

    def _may_promote(self) -> bool:
        return len(self.queues.lifted) < self._max_batch_size

    def _first_promoted(self, until: float, count: int) -> list[Request]:
        """Up to `count` swapped requests whose promotion comes first, and before `until`."""
        watch = self._swapped_watch
        valid: list[_Watched] = []
        while watch and watch[0][0] < until and len(valid) < count:
            entry = heapq.heappop(watch)
            if self._is_swapped_until(entry):
                valid.append(entry)
        for entry in valid:
            heapq.heappush(watch, entry)
        return [request for _, _, request in valid]

    def _open_watches(self) -> list[StarvationWatch]:
        """Return those of whose requests one more may be lifted to Q1."""
        queues = self.queues
        watches = (
            (self._started_watch, queues.lifted),
            (self._waiting_watch, queues.lifted_waiting),
        )
        return [watch for watch, lifted in watches if watch and len(lifted) < self._max_batch_size]

    def _watch_placed(self, request: Request) -> None:
        """Watch a request whose KV has just come somewhere or gone."""
        self._watch_starvation(request)
        if request.place is Place.SWAPPED and self._starvation_limit_s is not None:
            entry = (self._deadline(request), request.arrival_number, request)
            heapq.heappush(self._swapped_watch, entry)
            self._prune_swapped()

    def _prune_swapped(self) -> None:
        """Forget what is out of date when it is more than half: O(1) for each push."""
        if len(self._swapped_watch) > 2 * self.queues.count(Place.SWAPPED) + _FEW:
            self._swapped_watch = [
                entry for entry in self._swapped_watch if self._is_swapped_until(entry)
            ]
            heapq.heapify(self._swapped_watch)

    def _is_swapped_until(self, entry: _Watched) -> bool:
        """Whether an entry says when a request on the host will be promoted."""
        deadline, _, request = entry
        is_swapped = not request.is_finished and request.place is Place.SWAPPED
        return is_swapped and request.queue.level > 0 and deadline == self._deadline(request)

    def _watch_starvation(self, request: Request) -> None:
        if request.queue.level == 0:
            return
        is_waiting = request.place is Place.WAITING
        watch = self._waiting_watch if is_waiting else self._started_watch
        if watch and request not in watch:
            watch.add(request, len(self.queues))

    def _patience_s(self, request: Request) -> float:
        """How long a request without KV waits until it starves: longer if its prompt is long.

        A limit that is the same for all turns every overload into the order of arrival, and what
        is known for certain, the length of the prompt, would go unused.
        """
        patience = self.config.mlfq.prefill_patience
        return self._limit_s(request) + patience * self._next_iteration_s(request)

    def _limit_s(self, request: Request) -> float:
        """How long a request may wait: the lower levels of the less urgent turn more slowly."""
        limit_s = self._starvation_limit_s or 0.0
        if request.priority <= 0:
            return limit_s
        return limit_s * self.config.mlfq.quantum_ratio ** min(request.priority, self._lowest)

    def _deadline(self, request: Request) -> float:
        """When it is promoted unless it runs before."""
        return request.waiting_since + self._limit_s(request)

    # --- demotion --------------------------------------------------------------------------------

    def _demote(self, request: Request, decode_s: float) -> None:
        """Move one that decodes down; `decode_s` is at least the time of its next iteration."""
        self._count_for_session(request)
        level = max(request.queue.level + 1, request.priority)
        level = min(
            max(level, self._level_of_session(request, request.waiting_since)), self._lowest
        )
        if self.skip_join and decode_s > self.level_quanta_s[level]:
            level = max(level, self._level_that_holds(self._next_iteration_s(request)))
        self.queues.move(request, level)
        self._watch_starvation(request)

    def _count_for_session(self, request: Request) -> None:
        """Count what a request was charged since it came to its level, which it leaves now."""
        self._sessions.serve(request, request.queue.charged_s, request.waiting_since)

    def _level_of_session(self, request: Request, now: float) -> int:
        """Return the level of a request that was served as much as the session of this one."""
        attained_s = self._sessions.attained_s(request, now)
        return bisect_right(self._served_s, attained_s) if attained_s else 0

    def _level_that_holds(self, seconds: float) -> int:
        """The highest level whose quantum is at least this long, else the lowest level."""
        return min(bisect_left(self.level_quanta_s, seconds), self._lowest)

    def _next_iteration_s(self, request: Request) -> float:
        pending = request.num_pending_tokens
        if not request.num_computed_tokens:
            pending -= request.kv.num_cached_tokens
        if pending > 1:
            return self.cost_model.prefill_s(pending)
        return self.cost_model.decode_s(1, request.num_tokens)


class SkipJoinMlfq(Mlfq):
    """The MLFQ of the paper (section 4.1).

    A request joins the highest level whose quantum holds its prefill, and a demoted one skips the
    levels whose quantum could not hold its next iteration.
    """

    skip_join = True


def _waits_for_promotion(request: Request) -> bool:
    return not request.is_finished and request.queue.level > 0


def _waits_without_kv(request: Request) -> bool:
    return _waits_for_promotion(request) and request.place is Place.WAITING


def _waits_with_kv(request: Request) -> bool:
    return _waits_for_promotion(request) and request.place is not Place.WAITING
