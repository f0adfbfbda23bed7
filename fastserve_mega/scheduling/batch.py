"""Filling one step: who takes part, and with how many tokens."""

from __future__ import annotations

from collections.abc import Iterable

from fastserve_mega.plan import SequenceSlice
from fastserve_mega.scheduling.kv.admission import Admission
from fastserve_mega.scheduling.kv.manager import KvManager
from fastserve_mega.scheduling.policies.policy import Policy
from fastserve_mega.scheduling.request import Place, Request, RequestStatus
from fastserve_mega.system.config import SchedulerConfig

_UNDER_WAY = (RequestStatus.RUNNING, RequestStatus.SWAPPING_IN, RequestStatus.SWAPPING_OUT)


class BatchBuilder:
    """Takes requests by priority until the batch or its tokens are full (backfill).

    Prefills share what the decodes leave: a decode costs them next to nothing, and would wait for
    the whole of them.

    A request that finds no memory is passed over. Admission closes for this step when too many
    were passed over, or when one was in too many steps; after that only residents are taken, so
    that the memory which comes free goes to those who waited for it. Likewise for those that may
    not be started yet: after them the started ones are taken.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        memory: KvManager,
        policy: Policy,
        max_requests: int,
        in_flight: int,
    ) -> None:
        """Begin an empty step of at most `max_requests`, while `in_flight` are in other steps."""
        self.requests: list[Request] = []
        self.slices: list[SequenceSlice] = []
        self._memory = memory
        self._queues = policy.queues
        self._takes_swapped = Place.SWAPPED in memory.runnable_places
        self._max_requests = max_requests
        self._in_flight = in_flight
        self._tokens_left = config.max_batch_tokens
        self._lookahead = config.backfill_lookahead
        self._max_passed_over = config.max_passed_over
        self._admitting = True
        self._starting = True
        self._not_started_left = config.backfill_lookahead
        self._stops = False
        """Admission has just closed, or nobody else is started."""
        self._reserves_tokens = True
        """A prefill leaves a token to each decode that may stand behind it."""
        self._prefills_wait = False
        """What is left of the tokens is reserved for decodes."""

    def fill(self) -> None:
        """Take requests until nothing more fits."""
        if returning := self._memory.started.returning:
            self._take(returning)
            if not self._has_room():
                return
        self._take_by_priority()
        if self._has_room() and not (self._prefills_wait or self._starting) and self._admitting:
            self._take_by_priority()
        if self._has_room() and (self._prefills_wait or not self._admitting):
            self._take(self._queues.walk(Place.RESIDENT))
        if self._has_room() and self._prefills_wait:  # there were fewer decodes
            self._reserves_tokens = self._prefills_wait = False
            self._take_by_priority()

    def _has_room(self) -> bool:
        return self._tokens_left > 0 and len(self.requests) < self._max_requests

    def _take_by_priority(self) -> None:
        if self._admitting:
            enough = self._max_requests + self._lookahead + 1 if self._starting else 0
            self._take(self._queues.merged(self._memory.runnable_places, enough))
        else:
            self._take(self._queues.walk(Place.RESIDENT))

    def _take(self, candidates: Iterable[Request]) -> None:
        # The one loop whose cost counts: it looks at each running request in each step.
        requests, slices = self.requests, self.slices
        block_size = self._memory.block_size
        prefills_waited = self._prefills_wait
        ready, running = RequestStatus.READY, RequestStatus.RUNNING
        for request in candidates:
            if request.status is not ready and request.status in _UNDER_WAY:
                continue
            start = request.num_computed_tokens
            pending = request.num_tokens - start
            num_tokens = 1
            if pending > 1 and not (num_tokens := self._chunk(request, pending)):
                if prefills_waited:
                    continue
                return
            kv = request.kv
            table = kv.block_table
            if start + num_tokens > len(table) * block_size:
                if not self._has_memory(request, start + num_tokens):
                    if self._stops:
                        return
                    continue
                table, start = kv.block_table, request.num_computed_tokens
                pending = request.num_tokens - start  # some of it may have been cached
                num_tokens = min(num_tokens, pending)
            request.status = running
            request.num_scheduled_tokens = num_tokens
            request.num_passed_over = 0
            requests.append(request)
            sent = kv.num_sent_blocks
            new = self._memory.take_unsent(request) if sent != len(table) else ()
            samples = num_tokens == pending
            if not samples:
                self._prefills_wait = True
            slices.append(SequenceSlice(request.request_id, start, num_tokens, samples, sent, new))
            self._tokens_left -= num_tokens
            if not self._tokens_left or len(requests) == self._max_requests:
                return

    def _has_memory(self, request: Request, tokens: int) -> bool:
        """Give a request room for `tokens` tokens; sets `_stops` when admission closes."""
        self._stops = False
        if request.place is Place.RESIDENT:
            admission = self._memory.grow(request, tokens)
        elif request.place is Place.SWAPPED and not self._takes_swapped:
            return False  # preempted in this very step
        else:
            admission = self._memory.make_resident(request, reserve=len(self.requests))
        if admission is Admission.NO_MEMORY:
            self._pass_over(request)
        elif admission is Admission.NOT_STARTED:
            self._leave_unstarted(request)
        return admission is Admission.READY

    def _chunk(self, request: Request, pending: int) -> int:
        """Tokens of a prefill in this step; after one that does not get all, there are none."""
        if self._prefills_wait:
            return 0
        left = self._tokens_left
        if self._reserves_tokens:
            left -= self._decodes_behind(request)
        self._prefills_wait = left <= 0
        return max(min(pending, left), 0)

    def _decodes_behind(self, prefill: Request) -> int:
        """Decodes, at most, that may take the places behind a prefill; each needs a token.

        Those who wait for their prefill are none of them: they share what the decodes leave.
        """
        count = self._queues.count
        started = count(Place.RESIDENT) + (count(Place.SWAPPED) if self._takes_swapped else 0)
        others = started - self._in_flight - (prefill.place is not Place.WAITING)
        return max(min(others, self._max_requests - 1) - len(self.requests), 0)

    def _pass_over(self, request: Request) -> None:
        request.num_passed_over += 1
        self._lookahead -= 1
        if self._lookahead < 0 or request.num_passed_over > self._max_passed_over:
            self._stops = self._admitting
            self._admitting = False

    def _leave_unstarted(self, request: Request) -> None:
        request.num_passed_over += 1
        self._not_started_left -= 1
        if self._not_started_left < 0 or request.num_passed_over > self._max_passed_over:
            self._stops = self._starting
            self._starting = False
