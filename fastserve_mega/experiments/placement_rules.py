"""The simple rules that `Placement` is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from zlib import crc32

import numpy as np

from fastserve_mega.scheduling.events import Arrived
from fastserve_mega.scheduling.placement import Placement, Placer
from fastserve_mega.scheduling.scheduler import Scheduler


class RoundRobin:
    """One after the other, whatever they are busy with."""

    def __init__(self, schedulers: Sequence[Scheduler]) -> None:
        self._up = list(range(len(schedulers)))
        self._turns = 0

    def choose(self, arrived: Arrived) -> int:
        self._turns += 1
        return self._up[self._turns % len(self._up)]

    def settle(self) -> None:
        """Nothing was promised."""

    def observe_finish(self, output_tokens: int) -> None:
        """Nothing to learn."""

    def lose(self, replica: int) -> None:
        self._up.remove(replica)

    def restore(self, replica: int) -> None:
        self._up = sorted([*self._up, replica])


class PrefixOnly(RoundRobin):
    """To where most of the prompt is cached; round robin where that is nowhere."""

    def __init__(self, schedulers: Sequence[Scheduler]) -> None:
        super().__init__(schedulers)
        self._caches = [scheduler.memory.prefix_cache for scheduler in schedulers]

    def choose(self, arrived: Arrived) -> int:
        cached = {each: self._caches[each].tokens_of(arrived.block_hashes) for each in self._up}
        best = max(self._up, key=cached.__getitem__)
        return best if cached[best] else super().choose(arrived)


class LeastWork(Placement):
    """Where the work at hand is least, whatever is cached there."""

    DECODE_WEIGHT = 1.0
    PREFILL_WEIGHT = 0.0


class PowerOfTwo(LeastWork):
    """The one with less work of two that are drawn."""

    def __init__(self, schedulers: Sequence[Scheduler]) -> None:
        super().__init__(schedulers)
        self._random = np.random.default_rng(0)

    def choose(self, arrived: Arrived) -> int:
        up = self._replicas
        count = min(2, len(up))
        self._replicas = self._random.choice(up, count, replace=False).tolist()
        chosen = super().choose(arrived)
        self._replicas = up
        return chosen


class Sharded:
    """Four coordinators with a share of the replicas each, and a router that knows little.

    The router knows the first block of a prompt and how many requests each coordinator has. A
    prompt goes to the coordinator that its first block's hash says, so long as that has no more
    than `MAX_OVER_MEAN` times the mean of unfinished requests; else, or without a block, to the one
    with the fewest. The coordinator places it among its own replicas as always.
    """

    COORDINATORS = 4
    MAX_OVER_MEAN = 1.25

    def __init__(self, schedulers: Sequence[Scheduler]) -> None:
        count = min(self.COORDINATORS, len(schedulers))
        # Every fourth replica, so that each has as many fast ones.
        self._shares = [list(range(first, len(schedulers), count)) for first in range(count)]
        self._schedulers = schedulers
        self._placements = [
            Placement([schedulers[replica] for replica in share]) for share in self._shares
        ]
        self._lost: set[int] = set()

    def choose(self, arrived: Arrived) -> int:
        busy = [self._requests_each(share) for share in self._shares]
        chosen = busy.index(min(busy))
        if arrived.block_hashes:
            wanted = crc32(arrived.block_hashes[0].encode()) % len(busy)
            if busy[wanted] <= self.MAX_OVER_MEAN * sum(busy) / len(busy):
                chosen = wanted
        return self._shares[chosen][self._placements[chosen].choose(arrived)]

    def _requests_each(self, share: Sequence[int]) -> float:
        """Unfinished requests for each replica of a coordinator that is there."""
        up = [replica for replica in share if replica not in self._lost]
        if not up:
            return math.inf
        return sum(self._schedulers[replica].unfinished for replica in up) / len(up)

    def settle(self) -> None:
        for placement in self._placements:
            placement.settle()

    def observe_finish(self, output_tokens: int) -> None:
        for placement in self._placements:
            placement.observe_finish(output_tokens)

    def lose(self, replica: int) -> None:
        self._lost.add(replica)
        share, index = self._find(replica)
        self._placements[share].lose(index)

    def restore(self, replica: int) -> None:
        self._lost.remove(replica)
        share, index = self._find(replica)
        self._placements[share].restore(index)

    def _find(self, replica: int) -> tuple[int, int]:
        """Return its coordinator, and its number there."""
        count = len(self._shares)
        return replica % count, replica // count


RULES: dict[str, Callable[[Sequence[Scheduler]], Placer]] = {
    "round-robin": RoundRobin,
    "least-work": LeastWork,
    "prefix-only": PrefixOnly,
    "power-of-two": PowerOfTwo,
    "ours": Placement,
    "ours, sharded": Sharded,
}
SIMPLE_RULES = ("round-robin", "least-work", "prefix-only", "power-of-two")
