"""Fair shares between clients; the policy orders the requests of each.

A client that sends more than its share waits in a line of its own (`ClientLines`), and the policy
is *offered* its requests little by little. And in each step every client has a share of the places
and tokens, in the order of the policy; what is left goes to the lowest counter first
(`ClientCounters`). Nothing is kept free for anybody.

While there is one client its requests pass straight through, and nothing is counted.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence

from fastserve_mega.scheduling.clients.lines import ClientCounters, ClientLines
from fastserve_mega.scheduling.policies.policy import Policy
from fastserve_mega.scheduling.request import UNDER_WAY, ClientShare, Place, Request, RequestStatus
from fastserve_mega.system.config import SchedulerConfig
from fastserve_mega.types import BACKGROUND_PRIORITY

_BACKGROUND = "\0background"
"""Not a name that a client can have."""
_BACKGROUND_WEIGHT = 0.001
"""A thousandth of the service, so that what others do not want is not all that it gets."""
_MOST_LEFT_OUT = 8
"""Steps in a row from which the background is left out for the prefills of others. With short
prompts that come steadily there is one in each step, and most of each step is left."""
_MOST_PATIENT = 4
"""Priorities beyond this one leave room for as long as this one does."""


class FairShare:
    """Which requests the policy is offered, and in which order a step takes those of several.

    Args:
        config: limits of a step.
        policy: orders the requests of a client.
    """

    def __init__(self, config: SchedulerConfig, policy: Policy) -> None:
        self.counters = ClientCounters(config)
        self.lines = ClientLines(config, policy, self.counters)
        self._queues = policy.queues
        self._tokens = config.max_batch_tokens
        self._max_passed_over = config.max_passed_over
        self._looked_at = config.max_batch_size + config.backfill_lookahead + 1
        """Requests without KV of which a step sees no more."""
        self._left_out = 0
        """Steps that the background had no part in, since it was in one without a prefill of
        others."""
        self._step = 0
        self._rests: list[tuple[int, Iterator[Request]]] = []
        """What the walks of this step did not reach: requests over their client's share, with the
        number of their clients."""
        self._walks = 0
        """How many walks this step has begun."""
        self._whole_walks = 0
        """How many of them came to the end; the others ended among the requests within their
        shares, and know nothing of the rest."""

    @property
    def keeps_order(self) -> bool:
        """Whether a step takes requests in the order of the policy."""
        return not self.counters.is_shared

    @property
    def has_background(self) -> bool:
        """Whether there are requests in the background beside others."""
        return self.counters.is_shared and _BACKGROUND in self.counters.active

    @property
    def background_stands_back(self) -> bool:
        """Whether the background is to be left out of a step that computes a prefill of others.

        Not when it had no part in `_MOST_LEFT_OUT` steps: from then on it takes part in each,
        until there is one without such a prefill again.
        """
        return self._left_out < _MOST_LEFT_OUT

    def join(self, client: str, weight: float, priority: int) -> ClientShare:
        """Count one more request of a client, which is then to be added.

        What is in the background has no share of its own, whoever sent it.
        """
        if priority >= BACKGROUND_PRIORITY:
            client, weight = _BACKGROUND, _BACKGROUND_WEIGHT
        return self.counters.join(client, weight)

    def replaces(self, request: Request) -> bool:
        """Whether a request that has just come takes the place of one that has ended.

        Of a client that was turned away none does.
        """
        share = request.share
        return request.num_of_share <= share.most_at_once and not share.was_turned_away

    def let_in(self, request: Request) -> None:
        """Take in that a request may wait."""
        share = request.share
        share.most_at_once = max(share.most_at_once, request.num_of_share)

    def turn_away(self, request: Request) -> None:
        """Take in that a request may not."""
        request.share.was_turned_away = True

    def end(self, request: Request) -> None:
        """Take in the end of a request, which is in no queue any more."""
        self.lines.end(request)
        share = request.share
        share.unfinished -= 1
        if not share.unfinished:
            self.lines.leave(share)
            self.counters.leave(share)

    # --- one step ------------------------------------------------------------------------------

    def begin_step(self, places: int) -> None:
        """Begin a step of at most so many requests."""
        self._step += 1
        self.counters.places = places
        self._rests.clear()
        self._walks = self._whole_walks = 0

    def oldest(self) -> Sequence[Request]:
        """Return the oldest of each client, where the policy has too many to show them."""
        few = self._queues.count(Place.WAITING) <= self._looked_at
        if few or not self.counters.is_shared:
            return ()
        return self.lines.oldest(self._looked_at)

    def order(
        self, candidates: Iterable[Request], preempted: Container[Request]
    ) -> Iterable[Request]:
        """Order what a step may take: first each client's share, then the lowest counter first.

        Args:
            candidates: in the order of the policy; each one that comes out is taken, or cannot be.
            preempted: in this step, so it cannot take them.
        """
        shared = self.counters.is_shared
        return self._shared_order(candidates, preempted) if shared else candidates

    def _shared_order(
        self, candidates: Iterable[Request], preempted: Container[Request]
    ) -> Iterator[Request]:
        self._walks += 1
        step, ready = self._step, RequestStatus.READY
        rest: defaultdict[ClientShare, list[Request]] = defaultdict(list)
        for request in candidates:
            status = request.status
            if (status is not ready and status in UNDER_WAY) or request in preempted:
                continue
            share = request.share
            if share.step != step:
                self._begin(share)
            if share.is_spent:
                rest[share].append(request)
                continue
            tokens = request.num_tokens - request.num_computed_tokens
            if tokens > share.tokens_left and share.tokens:
                rest[share].append(request)
                continue
            share.places_left -= 1
            share.tokens += tokens
            share.tokens_left -= tokens
            share.is_spent = share.places_left <= 0 or share.tokens_left <= 0
            yield request
        self._whole_walks += 1
        groups = self._lowest_first(rest)
        self._rests += groups
        for _, group in groups:
            yield from group

    def _lowest_first(
        self, rest: dict[ClientShare, list[Request]]
    ) -> list[tuple[int, Iterator[Request]]]:
        """Order requests by the counters of their clients, with what they were given in this step.

        Of clients with equal counters the policy decides.
        """
        by_counter: defaultdict[float, list[list[Request]]] = defaultdict(list)
        for share, requests in rest.items():
            by_counter[share.counter + share.tokens / share.weight].append(requests)
        groups = []
        for counter in sorted(by_counter):
            first, *others = by_counter[counter]
            if others:
                first = sorted(itertools.chain(first, *others), key=self._queues.rank)
            groups.append((1 + len(others), iter(first)))
        return groups

    def _begin(self, share: ClientShare) -> None:
        """Begin a step for a client."""
        share.step = self._step
        share.tokens = 0
        share.places_left = self.counters.places_of(share)
        share.tokens_left = int(self._tokens / self.counters.weights * share.weight)
        share.is_spent = self.counters.is_ahead(share)

    def leaves_room(self, request: Request) -> bool:
        """Whether a request is to leave memory on the host to those who come before it.

        Else what was started early, of a client or of the less urgent, would fill all there is,
        and those could not even start. The less urgent do so for a while only.
        """
        if request.priority > 0:
            patience = self._max_passed_over * 2 ** min(request.priority, _MOST_PATIENT)
            if request.num_passed_over < patience:
                return True
        if not self.counters.is_shared:
            return False
        share, count = request.share, self._queues.count
        started = share.unfinished - share.num_held - len(share.offered)
        total = count(Place.RESIDENT) + count(Place.SWAPPED)
        return started * self.counters.weights > total * share.weight

    def charge(self, batch: Sequence[Request]) -> None:
        """Count the tokens of a step that is about to be dispatched; a recomputation is free."""
        if not self.counters.is_shared:
            self._left_out = 0
            return
        floor = self.counters.floor
        background = self.counters.active.get(_BACKGROUND)
        reads_others = False
        for request in batch:
            tokens, share = request.num_scheduled_tokens, request.share
            if tokens > 1:
                reads_others |= share is not background
                tokens = min(tokens, request.num_unread_tokens)
            counter = share.counter
            share.counter = (counter if counter > floor else floor) + tokens / share.weight
        if background and all(request.share is not background for request in batch):
            self._left_out += 1
        elif not reads_others:
            self._left_out = 0
        self._raise_floor(batch)

    def _raise_floor(self, batch: Sequence[Request]) -> None:
        """Set the floor to the lowest counter of those that wanted more; else nobody is behind.

        Who was reached and found no memory does not count: what it cannot use it is not owed.
        """
        if not self._walks or self._walks > self._whole_walks:
            return
        wanting = set[ClientShare]().union(*itertools.starmap(_who_wants, self._rests))
        if (lowest := self.lines.first()) is not None:
            wanting.add(lowest)
        if wanting:
            floor = min(map(self.counters.of, wanting))
        else:
            floor = max((request.share.counter for request in batch), default=0.0)
        self.counters.floor = max(self.counters.floor, floor)


def _who_wants(num_clients: int, requests: Iterable[Request]) -> set[ClientShare]:
    """Return whose requests are among these that are in no step, of at most so many clients."""
    wanting = set[ClientShare]()
    for request in requests:
        if request.status is not RequestStatus.RUNNING:
            wanting.add(request.share)
            if len(wanting) == num_clients:
                break
    return wanting
