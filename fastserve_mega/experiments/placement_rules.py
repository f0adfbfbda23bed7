"""The simple rules that `Placement` is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


RULES: dict[str, Callable[[Sequence[Scheduler]], Placer]] = {
    "round-robin": RoundRobin,
    "least-work": LeastWork,
    "prefix-only": PrefixOnly,
    "power-of-two": PowerOfTwo,
    "ours": Placement,
}
