"""Filling one step: who takes part, and with how many tokens; and counting when it is done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fastserve_mega.plan import SequenceSlice
from fastserve_mega.scheduling.clients.fair_share import FairShare
from fastserve_mega.scheduling.kv.admission import MemoryOutcome
from fastserve_mega.scheduling.kv.manager import KvManager
from fastserve_mega.scheduling.policies.policy import Policy
from fastserve_mega.scheduling.request import UNDER_WAY, KvState, Place, Request, RequestStatus
from fastserve_mega.system.config import SchedulerConfig

_BACKGROUND_PART = 16
"""Beside other work, the prefills of the background take this part of a step's tokens: a newcomer
waits for the step that is under way."""


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
        fair_share: FairShare,
        *,
        max_requests: int,
        in_flight: int,
    ) -> None:
        """Begin an empty step of at most `max_requests`, while `in_flight` are in other steps."""
        self.requests: list[Request] = []
        self.slices: list[SequenceSlice] = []
        self._memory = memory
        self._preempted = memory.swapper.preempted
        self._queues = policy.queues
        self._fair_share = fair_share
        self._takes_swapped = Place.SWAPPED in memory.runnable_places
        self._max_requests = max_requests
        self._in_flight = in_flight
        self._max_tokens = config.max_batch_tokens
        self._prefill_tokens = 0
        """Tokens beyond the first of each request."""
        self._reads_background = False
        """There is a prefill of the background in the step."""
        self._full_at = min(max_requests, config.max_batch_tokens)
        """Requests with which the batch or its tokens are full; each of them has one at least."""
        self._lookahead = config.backfill_lookahead
        self._max_passed_over = config.max_passed_over
        self._admitting = True
        self._starting = True
        self._not_started_left = self._leaving_left = config.backfill_lookahead + 1
        self._stops = False
        """The walk ends: admission has just closed, nobody else is started, or prefills wait."""
        self._reserves_tokens = True
        """A prefill leaves a token to each decode that may stand behind it."""
        self._prefills_wait = False
        """What is left of the tokens is reserved for decodes."""
        self._passes_prefills = False
        """The walk goes on behind prefills that find no tokens."""
        self._growth_ended = False
        """A resident could not have got a single block, and those behind it have fewer victims."""

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
            self._take_residents()
        if self._has_room() and self._prefills_wait:  # there were fewer decodes
            self._reserves_tokens = self._prefills_wait = False
            self._take_by_priority()

    def _has_room(self) -> bool:
        return len(self.requests) < self._full_at

    def _take_by_priority(self) -> None:
        if self._admitting:
            enough = self._max_requests + self._lookahead + 1 if self._starting else 0
            oldest = self._fair_share.oldest() if self._starting else ()
            first = self._queues.merged(self._memory.runnable_places, enough, oldest)
            self._take(self._order(first))
        else:
            self._take_residents()

    def _take_residents(self) -> None:
        self._take(self._order(self._queues.walk(Place.RESIDENT)))

    def _order(self, candidates: Iterable[Request]) -> Iterable[Request]:
        ordered = self._fair_share.order(candidates, self._preempted)
        return self._spare_prefills(ordered) if self._fair_share.has_background else ordered

    def _spare_prefills(self, candidates: Iterable[Request]) -> Iterator[Request]:
        """Leave out the background, which comes last, in a step that computes a prefill.

        So it makes nobody's first token later, until it has stood still for too long. Of its own
        prefills there is one in a step.
        """
        stands_back = self._fair_share.background_stands_back
        for request in candidates:
            if request.is_background and (
                (self._prefill_tokens and stands_back)
                or (self._reads_background and request.num_pending_tokens > 1)
            ):
                continue
            yield request

    def _take(self, candidates: Iterable[Request]) -> None:
        # One of two loops that look at each running request in each step (`Scheduler._step_done`
        # has the other): a decode that changes nothing is counted here, the rest looked at closely.
        requests, slices = self.requests, self.slices
        ready, running = RequestStatus.READY, RequestStatus.RUNNING
        self._passes_prefills = self._prefills_wait
        self._growth_ended = False
        full_at = self._full_at
        for request in candidates:
            start = request.num_computed_tokens
            if start < request.steady_until:
                if request.status is not ready:  # in another step
                    continue
                request.status = running
                request.num_scheduled_tokens = 1
                requests.append(request)
                sent = request.kv.num_sent_blocks
                slices.append(SequenceSlice(request.request_id, start, 1, True, sent, ()))
            elif self._take_closely(request):
                full_at = self._full_at
            elif self._stops:
                return
            if len(requests) >= full_at:
                return

    def _take_closely(self, request: Request) -> bool:
        """Give a request its tokens and blocks, if there are any; whether it takes part."""
        self._stops = False
        if request.status in UNDER_WAY or request in self._preempted:
            return False
        kv, start = request.kv, request.num_computed_tokens
        pending = request.num_tokens - start
        num_tokens = 1 if pending == 1 else self._chunk(request, pending)
        if not num_tokens:
            self._stops = not self._passes_prefills
            return False
        if start + num_tokens > len(kv.block_table) * self._memory.block_size:
            if not self._has_memory(request, start + num_tokens):
                return False
            start = request.num_computed_tokens
            pending = request.num_pending_tokens  # some of it may have been cached
            num_tokens = min(num_tokens, pending)
        request.status = RequestStatus.RUNNING
        request.num_scheduled_tokens = num_tokens
        request.num_passed_over = 0
        samples = num_tokens == pending
        if not samples:
            self._prefills_wait = True
        else:
            self._prepare_next(request, start + num_tokens)
        sent = kv.num_sent_blocks
        new = self._memory.take_unsent(request) if sent != len(kv.block_table) else ()
        self.requests.append(request)
        self.slices.append(SequenceSlice(request.request_id, start, num_tokens, samples, sent, new))
        if num_tokens > 1:
            self._prefill_tokens += num_tokens - 1
            self._reads_background |= request.is_background
            self._full_at = min(self._max_requests, self._max_tokens - self._prefill_tokens)
        return True

    def _prepare_next(self, request: Request, computed: int) -> None:
        """See to what a request with `computed` tokens needs when it has yielded one more."""
        memory, kv = self._memory, request.kv
        if memory.grows_ahead and computed == len(kv.block_table) * memory.block_size:
            memory.grow_ahead(request)
        if request.has_progressed:
            request.steady_until = _steady_until(kv, memory.block_size, memory.grows_ahead)

    def _has_memory(self, request: Request, tokens: int) -> bool:
        """Give a request room for `tokens` tokens; sets `_stops` when admission closes."""
        if request.status is RequestStatus.READY:
            if self._growth_ended:
                self._pass_over(request)
                return False
            outcome = self._memory.grow(request, tokens)
            if outcome is MemoryOutcome.NO_MEMORY:
                self._growth_ended = (
                    self._memory.reclaimer.growth_ended(request) and self._fair_share.keeps_order
                )
        else:
            # Who is on the host has its room there already.
            waits = request.place is Place.WAITING
            leaves_room = waits and self._fair_share.leaves_room(request)
            if leaves_room and not self._leaving_left:
                return False
            outcome = self._memory.make_resident(
                request, reserve=len(self.requests), leaves_room=leaves_room
            )
            if leaves_room and outcome is MemoryOutcome.NOT_STARTED:
                request.num_passed_over += 1
                self._leaving_left -= 1
                return False  # others need not wait for it
        if outcome is MemoryOutcome.NO_MEMORY:
            self._pass_over(request)
        elif outcome is MemoryOutcome.NOT_STARTED:
            self._leave_unstarted(request)
        return outcome is MemoryOutcome.READY

    def _chunk(self, request: Request, pending: int) -> int:
        """Tokens of a prefill in this step; after one that does not get all, there are none."""
        if self._prefills_wait:
            return 0
        left = self._max_tokens - self._prefill_tokens - len(self.requests)
        if self._reserves_tokens:
            left -= self._decodes_behind(request)
        if request.is_background and not self._fair_share.keeps_order:
            left = min(left, self._max_tokens // _BACKGROUND_PART + 1)
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
        if self._not_started_left <= 0 or request.num_passed_over > self._max_passed_over:
            self._stops = self._starting
            self._starting = False


def count_decodes(batch: list[Request], elapsed_s: float, now: float) -> tuple[list[Request], int]:
    """Account for those of a step that is done who need nothing but to be counted.

    Returns:
        The others, in their order, and the tokens whose KV those who were counted had read.
    """
    # The other of two loops that look at each running request in each step (`BatchBuilder._take`):
    # `steady_until` says that it has room and yields a token, and that nobody waits for its blocks.
    ready = RequestStatus.READY
    others = []
    context_tokens = 0
    for request in batch:
        computed = request.num_computed_tokens + 1
        if computed > request.steady_until:
            others.append(request)
            continue
        request.num_computed_tokens = computed
        request.num_tokens = computed + 1
        request.num_scheduled_tokens = 0
        request.waiting_since = now
        request.status = ready
        if request.preemption_credit_s > 0.0:
            request.preemption_credit_s -= elapsed_s
        context_tokens += computed
    return others, context_tokens


def _steady_until(kv: KvState, block_size: int, grows_ahead: bool) -> int:
    """Return the computed tokens at which a decoding resident needs more than to be counted.

    That is when it needs another block, or when it fills one that others can find then.
    """
    room = len(kv.block_table) * block_size - grows_ahead
    if kv.num_published_blocks < len(kv.block_hashes):
        return min(room, (kv.num_published_blocks + 1) * block_size - 1)
    return room
