"""What each client was served: virtual token counters (VTC, Sheng et al., OSDI 2024)."""

from __future__ import annotations

from collections import OrderedDict

from fastserve_mega.scheduling.request import ClientShare
from fastserve_mega.system.config import SchedulerConfig

_SLACK_STEPS = 2
"""A client may be so many full steps ahead of another that wants more: so much the policy is free
to prefer one of them, and a long prompt does not hold up the decoding of the one that sent it."""
_MOST_REMEMBERED = 10_000
"""Clients without requests whose counters are kept."""


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
