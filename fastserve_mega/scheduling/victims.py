"""Whose KV leaves the device when others need its blocks."""

from __future__ import annotations

from collections.abc import Iterator

from fastserve_mega.scheduling.kv_blocks import BlockPool
from fastserve_mega.scheduling.policy import Policy
from fastserve_mega.scheduling.request import Place, Request

_LOOKED_AT = 64
"""Residents among which a step looks for victims: those of lowest priority. With more of them
nobody notices who exactly it is, and a step's cost does not grow with the residents."""


class Victims:
    """The residents that may be preempted in this step, whoever will run last (ENST) first."""

    def __init__(self, policy: Policy, device: BlockPool) -> None:
        self._policy = policy
        self._device = device
        self._found: list[Request] | None = None
        self._now = 0.0

    def begin_step(self, now: float) -> None:
        """Forget who was found in the step before."""
        self._found = None
        self._now = now

    def __iter__(self) -> Iterator[Request]:
        """Those whose preemption costs nobody anything that is not paid back."""
        return (victim for victim in self._all() if victim.unpaid_s <= 0)

    def _all(self) -> Iterator[Request]:
        if self._found is None:
            latest = self._policy.latest_residents(self._now, _LOOKED_AT)
            self._found = [r for r in latest if r.sampled_since_admission and not r.copies]
            self._found.sort(key=_is_unpaid)
        return (
            victim
            for victim in self._found
            if victim.block_table and not victim.in_flight_tokens and not victim.copies
        )

    def choose(self, request: Request, blocks: int) -> tuple[list[Request], int]:
        """Victims of lower priority that hold `blocks` blocks alone together, or all of them.

        Whoever runs already may take them from anybody, else all could wait for each other; who is
        to be admitted, only from those who have paid back.

        Returns:
            The victims, and the blocks that come free with them.
        """
        own_rank = self._policy.rank(request)
        candidates = self._all() if request.place is Place.RESIDENT else self
        rank = self._policy.rank
        chosen: list[Request] = []
        held = 0
        for victim in candidates:
            if held >= blocks:
                break
            if rank(victim) > own_rank:
                chosen.append(victim)
                held += self._device.exclusive(victim.block_table)
        return chosen, held


def _is_unpaid(request: Request) -> bool:
    return request.unpaid_s > 0
