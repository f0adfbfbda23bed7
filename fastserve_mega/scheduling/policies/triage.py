"""Whom to start when not all can be served in time; for `paced`."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable
from itertools import islice

from fastserve_mega.scheduling.policies.queues import LevelledQueues
from fastserve_mega.scheduling.policies.readers import RESIDENTS_THAT_RUN, Reader, Readers, Standing
from fastserve_mega.scheduling.policies.starvation import StarvationWatch
from fastserve_mega.scheduling.request import Place, Request
from fastserve_mega.system.config import SchedulerConfig

_LOOKED_AT = 128
"""Waiting requests that a step chooses from: those with the first deadlines."""
_USED = 0.9
"""Share of the tokens of full batches that is promised to readers."""
_USED_WHILE_SWAPPING = 0.85
"""So much less while KV moves between device and host: places stay empty for who is copied."""
_STARVED_SHARE = 0.1
"""Share of the time that is for the starved."""
_SMOOTHING = 0.05
_LARGER = 2.0
"""An answer is given up for a request that makes less work by this factor."""
_CRUMB = 0.4
"""What an answer that was given up still takes, in places."""


class Triage:
    """Decides which requests are started, so that the promises to those that were can be kept.

    - A *place* is the pace of one reader. There are as many as full batches of the present step
      time make tokens, less some; of the residents alone when not all fit on the device.
    - Of those who wait, as many are kept as can have their first token in time: in the order of
      deadlines, and whenever one would be late, the one with the longest prefill is let go (Moore
      and Hodgson: no other choice keeps more). Those with the least work get the places.
    - Without a place left, an answer whose rest is much more work is given up: its reader waits,
      and others are served in time with what it would have taken.
    - Nobody waits for ever: who has waited for `patience` times its own service is *starved*, and
      a share of the time is for the starved, one after the other in the order of starving. It is
      a share of the time and not of the requests, since who starves makes the most work; and it
      is given chunk by chunk, since the others would be late behind the whole of a long prompt.

    Args:
        config: of the scheduler.
        readers: knows deadlines and work.
        queues: of the scheduler's requests.
        set_standing: moves a request to another level.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        readers: Readers,
        queues: LevelledQueues,
        set_standing: Callable[[Request, Standing], None],
    ) -> None:
        self._readers = readers
        self._queues = queues
        self._set_standing = set_standing
        self._batch_size = config.max_batch_size
        self._tpot_s = config.paced.tpot_s
        self._starving = StarvationWatch(
            lambda request: config.paced.ttft_s + config.paced.patience * readers[request].work_s,
            self._may_starve,
        )
        self._in_time: dict[Request, None] = {}
        """Those who wait and may still have their first token in time, by arrival."""
        self._lifted: Request | None = None
        """The starved request that is being started, and has no token yet."""
        self._streams: list[tuple[int, float, int, Request]] = []
        """Answers with a place: priority, cost, arrival number; the last is given up first."""
        self._stream_of: dict[Request, tuple[int, float, int, Request]] = {}
        self._num_given_up = 0
        self._next_starved_s = 0.0
        """From when on the starved have had less than their share."""
        self.late_share = 1.0
        """Lately, of those who began while others could not be in time: how many could not."""

    def add(self, request: Request) -> None:
        """Take in a request that arrived."""
        self._in_time[request] = None
        self._starving.add(request, len(self._queues))

    def began(self, request: Request, now: float) -> None:
        """Take in that a request has its first token."""
        if self._queues.count(Place.WAITING) > len(self._in_time):
            is_late = request not in self._in_time
            self.late_share += _SMOOTHING * (is_late - self.late_share)
        self._in_time.pop(request, None)
        if request is self._lifted:
            self._lifted = None
            self._spend(self._readers[request].work_s, now)
        self._give_place(request)

    def read_on(self, request: Request, spent_s: float, now: float) -> None:
        """Take in that so much of a prefill was done, which goes on."""
        if request is self._lifted:
            self._spend(spent_s, now)
            self._set_standing(request, Standing.LATE)

    def _spend(self, work_s: float, now: float) -> None:
        """Count what a starved request took: nothing more is for them until it is their share."""
        self._next_starved_s = max(self._next_starved_s, now) + work_s / _STARVED_SHARE

    def resized(self, request: Request) -> None:
        """Take in that the work of an answer was estimated anew."""
        if request in self._stream_of:
            self._take_place(request)
            self._give_place(request)

    def remove(self, request: Request, reader: Reader) -> None:
        """Forget a request that ends."""
        self._in_time.pop(request, None)
        if request is self._lifted:
            self._lifted = None
        if request in self._stream_of:
            self._take_place(request)
        self._num_given_up -= reader.is_given_up

    def num_in_time_before(self, newcomer: Request, longer_s: float) -> int | None:
        """Return how many get their places before a newcomer; None: it cannot be in time.

        Those who make more work than `longer_s` come after it; of very many it is not known who.
        """
        if newcomer not in self._in_time:
            return None
        readers, last = self._readers, (newcomer.priority, longer_s)
        if len(self._in_time) > _LOOKED_AT:
            return len(self._in_time)
        ranks = ((each.priority, readers[each].cost_s) for each in self._in_time)
        return sum(rank < last for rank in ranks) - 1  # itself

    def next_deadline(self, now: float) -> float | None:
        """Return when the next request starves; None for never."""
        return self._starving.next_deadline(now)

    def choose(self, now: float) -> None:
        """Start whom there are places for, the starved first; let go who would be late."""
        places = self._places(now)
        if now >= self._next_starved_s:
            if not self._lifted and places >= 1.0 and (starved := self._starving.pop(now)):
                places -= 1.0
                self._in_time.pop(starved, None)
                self._lifted = starved
            if self._lifted:
                self._set_standing(self._lifted, Standing.URGENT)
        if self._in_time:
            self._start(self._keep(now), places)

    # --- places ----------------------------------------------------------------------------------

    def _places(self, now: float) -> float:
        """Return how many more readers can be served."""
        if self._is_behind(now):
            return 0.0
        served = float(self._batch_size)
        if self._queues.count(Place.SWAPPED):
            # That is less than a batch where the device holds few.
            running = RESIDENTS_THAT_RUN * self._queues.count(Place.RESIDENT)
            served = min(_USED_WHILE_SWAPPING * served, running)
        # Where a step takes longer than that, nobody can be served faster than once a step.
        token_s = max(self._tpot_s, self._readers.interval_s)
        places = max(_USED * served * token_s / self._readers.interval_s, 1.0)
        taken = len(self._streams) + _CRUMB * self._num_given_up + (self._lifted is not None)
        return places - taken

    def _is_behind(self, now: float) -> bool:
        """Whether the reader of an answer waits, though it was not given up.

        So the places correct themselves: what they leave out, such as how much the answers that
        were given up take, is found by the promises that it breaks.
        """
        for place in Place:  # one that lost its KV waits again
            for request in self._queues.of_highest(place)[: self._batch_size]:
                if not self._readers.is_behind(request, now):
                    break
                reader = self._readers[request]
                is_promised = reader.has_begun and not reader.is_given_up
                if is_promised and not request.num_scheduled_tokens:
                    return True
        return False

    def _give_place(self, request: Request) -> None:
        cost_s = self._readers[request].cost_s
        stream = (request.priority, cost_s, request.arrival_number, request)
        self._stream_of[request] = stream
        insort(self._streams, stream)

    def _take_place(self, request: Request) -> None:
        del self._streams[bisect_left(self._streams, self._stream_of.pop(request))]

    # --- who is started --------------------------------------------------------------------------

    def _keep(self, now: float) -> list[Request]:
        """Return those who can have their first token in time; let the others go."""
        readers = self._readers
        end_s = now + readers.interval_s
        kept: list[tuple[float, int, Request]] = []
        late = []
        for request in islice(self._in_time, _LOOKED_AT):
            prefill_s = readers.prefill_s(request)
            end_s += prefill_s
            heapq.heappush(kept, (-prefill_s, request.arrival_number, request))
            if end_s > readers[request].due_s:
                shorter_s, _, longest = heapq.heappop(kept)
                end_s += shorter_s
                late.append(longest)
        for request in late:
            del self._in_time[request]
            self._set_standing(request, Standing.LATE)
        return [request for _, _, request in kept]

    def _start(self, kept: list[Request], places: float) -> None:
        """Give the places to those with the least work; who has begun its prefill goes on."""
        readers = self._readers
        for request in kept:
            readers[request].work_s = readers.work_s(request)
        kept.sort(key=lambda each: (each.priority, readers[each].cost_s, each.arrival_number))
        for request in kept:
            if places < 1.0:
                places += self._give_up_for(request)
            is_started = places >= 1.0 or request.num_computed_tokens > 0
            places -= is_started
            self._set_standing(request, Standing.URGENT if is_started else Standing.LATE)

    def _give_up_for(self, request: Request) -> float:
        """Give up the answer with the most work if that is much more; return the places won."""
        if not self._streams:
            return 0.0
        priority, cost_s, _, largest = self._streams[-1]
        if priority < request.priority or cost_s < _LARGER * self._readers[request].cost_s:
            return 0.0
        self._take_place(largest)
        self._num_given_up += 1
        self._readers[largest].is_given_up = True
        self._set_standing(largest, Standing.LATE)
        return 1.0 - _CRUMB

    def _may_starve(self, request: Request) -> bool:
        return not (request.is_finished or self._readers[request].has_begun)
