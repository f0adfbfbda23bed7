"""What each client was served, and where its requests wait until the policy is offered them.

The counters are virtual token counters (VTC, Sheng et al., OSDI 2024).
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator

from fastserve_mega.scheduling.policies.policy import Policy
from fastserve_mega.scheduling.request import ClientShare, Place, Request, RequestStatus, Turn
from fastserve_mega.system.config import SchedulerConfig

_SLACK_STEPS = 2
"""A client may be so many full steps ahead of another that wants more: so much the policy is free
to prefer one of them, and a long prompt does not hold up the decoding of the one that sent it."""
_MOST_REMEMBERED = 10_000
"""Clients without requests whose counters are kept."""
_FEW = 64


class ClientCounters:
    """The clients with unfinished requests, and who of them is ahead of the others.

    A counter is the tokens that a client was served, over its weight: of prompts and answers, each
    once, without those whose KV the prefix cache had.

    Args:
        config: limits of a step.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.slack = float(_SLACK_STEPS * config.max_batch_tokens)
        """By how much counters may differ before the order of the policy gives way."""
        self.places = config.max_batch_size
        """Requests of a step; those of the next one may be fewer."""
        self.active: dict[str, ClientShare] = {}
        self.floor = 0.0
        """The lowest counter of those that lately wanted more than they got. No client is owed
        anything from before: its counter is at least this."""
        self.weights = 0.0
        """Weight of the active clients together."""
        self._left: OrderedDict[str, float] = OrderedDict()
        """Counters of clients that had been ahead when their last request ended."""

    @property
    def is_shared(self) -> bool:
        """Whether several clients have unfinished requests."""
        return len(self.active) > 1

    def join(self, client: str, weight: float) -> ClientShare:
        """Count one more request of a client; its weight is that of the newest."""
        share = self.active.get(client)
        if share is None:
            counter = max(self._left.pop(client, 0.0), self.floor)
            share = self.active[client] = ClientShare(client, weight, counter)
            self.weights += weight
        elif weight != share.weight:
            self.weights += weight - share.weight
            share.weight = weight
        share.unfinished += 1
        return share

    def leave(self, share: ClientShare) -> None:
        """Forget a client whose last request has ended, unless it is ahead of others."""
        del self.active[share.name]
        self.weights = self.weights - share.weight if self.active else 0.0
        if not self.is_shared:  # there is nobody to be fair to
            self._left.clear()
        elif share.counter > self.floor:
            self._left[share.name] = share.counter
            if len(self._left) > _MOST_REMEMBERED:
                self._left.popitem(last=False)

    def of(self, share: ClientShare) -> float:
        """Return the counter of a client."""
        return max(share.counter, self.floor)

    def is_ahead(self, share: ClientShare) -> bool:
        """Whether a client has been served more than the policy may prefer it by."""
        return share.counter > self.floor + self.slack

    def places_of(self, share: ClientShare) -> int:
        """Return how many places of a step are a client's by its weight."""
        return max(int(self.places * share.weight / self.weights), 1)


class ClientLines:
    """A line for each client that has sent more than the policy is offered at once.

    Args:
        config: limits of a step.
        policy: orders each line, and what it was offered.
        counters: say whose turn it is.
    """

    def __init__(self, config: SchedulerConfig, policy: Policy, counters: ClientCounters) -> None:
        self.num_held = 0
        """Requests that wait in a line."""
        self._policy = policy
        self._queues = policy.queues
        self._counters = counters
        self._max_batch_size = config.max_batch_size
        self._enough = config.max_batch_size + config.backfill_lookahead // 2
        """Requests without KV for the policy to have while there are lines. A step looks at more,
        so that it sees newcomers."""
        self._lines = _LowestFirst(counters.of)
        """The clients that have a line."""
        self._not_full = _LowestFirst(counters.of)
        """Those of them that may have more requests before the policy."""
        self._full: dict[ClientShare, None] = {}
        """The others."""
        self._fronts: OrderedDict[ClientShare, None] = OrderedDict()
        """The clients of which the policy has requests that have not run, by when it was that the
        one which is now the first of them became so."""
        self._numbers = itertools.count()

    def held(self) -> Iterator[Request]:
        """Iterate over the requests that wait in a line."""
        for share in self._counters.active.values():
            yield from (entry[-1] for entry in share.line if entry[-1].turn is Turn.HELD)

    def oldest(self, count: int) -> list[Request]:
        """Return the requests offered first of each client, up to so many in all."""
        waiting = RequestStatus.WAITING
        found: list[Request] = []
        for share in itertools.islice(self._fronts, count):
            offered = itertools.islice(share.offered, self._counters.places_of(share))
            found += [each for each in offered if each.status is waiting]
            if len(found) >= count:
                break
        return found[:count]

    def expected_wait_s(self, request: Request, pace_s: float) -> float:
        """Return how long a request that has just come will wait for its start, in seconds.

        Where it waits in a line, the clients take turns, and all of them are about as far as its
        own when it is its turn.

        Args:
            request: waits for its first step.
            pace_s: from one start to the next while requests wait.
        """
        if request.turn is not Turn.HELD:
            return self._policy.expected_wait_s(request, pace_s)
        share, waiting = request.share, self._queues.count(Place.WAITING) + self.num_held - 1
        own = share.num_held - 1 + len(share.offered)
        return pace_s * (1 + min(round(own * self._counters.weights / share.weight), waiting))

    def first(self) -> ClientShare | None:
        """Return the client with the lowest counter of those that have a line."""
        return self._lines.first()

    def add(self, request: Request, now: float) -> None:
        """Offer a request that has arrived to the policy, or hold it in its client's line."""
        share, counters = request.share, self._counters
        request.num_of_share = share.unfinished
        is_over = counters.is_shared and (counters.is_ahead(share) or self._is_full(share))
        if not (share.num_held or is_over):
            self._offer(request, now)
            return
        request.turn = Turn.HELD
        entry = (self._policy.line_key(request), next(self._numbers), request)
        heapq.heappush(share.line, entry)
        share.num_held += 1
        self.num_held += 1
        self._lines.add(share)
        self._not_full.add(share)

    def started(self, request: Request) -> None:
        """Take in that a step has computed something of an offered request for the first time."""
        request.turn = Turn.STARTED
        self._is_offered_no_more(request)

    def end(self, request: Request) -> None:
        """Take in the end of a request, which is in no queue any more."""
        share = request.share
        turn, request.turn = request.turn, Turn.STARTED
        if turn is Turn.HELD:
            share.num_held -= 1
            self.num_held -= 1
            self._prune(share)
        elif turn is Turn.OFFERED:
            self._is_offered_no_more(request)

    def leave(self, share: ClientShare) -> None:
        """Forget a client whose last request has ended."""
        share.line.clear()
        self._full.pop(share, None)

    def _is_offered_no_more(self, request: Request) -> None:
        share = request.share
        del share.offered[request]
        if share.offered:
            self._fronts.move_to_end(share)
        else:
            del self._fronts[share]
        if share.num_held:
            self._not_full.add(share)

    def refill(self, now: float) -> None:
        """Offer requests from the lines, the lowest counter first.

        Each client that is not ahead gets its share of a batch before the policy, and the lowest a
        whole one. Beyond that the policy has enough to fill a step: so a place is empty only when
        no line is.
        """
        if not self.num_held:
            return
        if (lowest := self._lines.first()) is not None:
            while lowest.num_held and len(lowest.offered) < self._max_batch_size:
                self._offer_next(lowest, now)
        while self.num_held:
            scarce = self._queues.count(Place.WAITING) < self._enough
            if scarce:
                self._reopen()
            share = self._not_full.first()
            if share is None or (not scarce and self._counters.is_ahead(share)):
                return
            if scarce or not self._is_full(share):
                self._offer_next(share, now)
            else:
                self._not_full.remove_first()
                self._full[share] = None

    def _reopen(self) -> None:
        """Let those give more that have their share before the policy; they are not enough."""
        for share in self._full:
            if share.num_held:
                self._not_full.add(share)
        self._full.clear()

    def _offer_next(self, share: ClientShare, now: float) -> None:
        while True:
            request: Request = heapq.heappop(share.line)[-1]
            if request.turn is Turn.HELD:
                break
        share.num_held -= 1
        self.num_held -= 1
        # In the order of the policy it comes now: else a line would be as good as no line.
        request.offered_at = request.waiting_since = now
        self._offer(request, now)

    def _offer(self, request: Request, now: float) -> None:
        request.turn = Turn.OFFERED
        request.share.offered[request] = None
        self._fronts[request.share] = None
        self._policy.add(request, now)

    def _is_full(self, share: ClientShare) -> bool:
        return len(share.offered) >= self._counters.places_of(share)

    @staticmethod
    def _prune(share: ClientShare) -> None:
        """Forget the aborted when they are more than half of a line: O(1) for each."""
        if len(share.line) > 2 * share.num_held:
            share.line = [entry for entry in share.line if entry[-1].turn is Turn.HELD]
            heapq.heapify(share.line)


class _LowestFirst:
    """Clients with lines, the lowest counter first: O(log n), since counters only grow."""

    def __init__(self, counter: Callable[[ClientShare], float]) -> None:
        self._counter = counter
        self._heap: list[tuple[float, int, ClientShare]] = []
        self._members: set[ClientShare] = set()
        self._numbers = itertools.count()
        self._most = _FEW

    def add(self, share: ClientShare) -> None:
        if share in self._members:
            return
        self._members.add(share)
        heapq.heappush(self._heap, (self._counter(share), next(self._numbers), share))
        if len(self._heap) > self._most:  # O(1) for each push
            self._heap = [entry for entry in self._heap if entry[2].num_held]
            heapq.heapify(self._heap)
            self._members = {share for _, _, share in self._heap}
            self._most = 2 * len(self._heap) + _FEW

    def first(self) -> ClientShare | None:
        """Return the client with the lowest counter; those without a line are forgotten."""
        heap = self._heap
        while heap:
            counter, _, share = heap[0]
            if not share.num_held:
                self.remove_first()
            elif counter < (now := self._counter(share)):
                heapq.heapreplace(heap, (now, next(self._numbers), share))
            else:
                return share
        return None

    def remove_first(self) -> None:
        self._members.remove(heapq.heappop(self._heap)[2])
