"""Who gives up device blocks when others need them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from fastserve_mega.scheduling.enst_order import EnstOrder
from fastserve_mega.scheduling.policy import Policy
from fastserve_mega.scheduling.request import Request

_LOOKED_AT = 256
"""Residents among which a step looks for victims: those who will run last. With more of them
nobody notices who exactly it is, and a step's cost does not grow with the residents."""


class Victims:
    """The residents that may be preempted in this step, whoever will run last (ENST) first."""

    def __init__(self, residents: EnstOrder, policy: Policy) -> None:
        self._residents = residents
        self._policy = policy
        self._found: list[Request] | None = None
        self._no_more: tuple[Any, int] | None = None
        """A rank, and the blocks that preempting everybody below it could still free."""

    def begin_step(self) -> None:
        """Forget who was found in the step before."""
        self._found = None
        self._no_more = None

    def __iter__(self) -> Iterator[Request]:
        if self._found is None:
            latest = islice(self._residents.latest_first(), _LOOKED_AT)
            self._found = [r for r in latest if r.sampled_since_admission and not r.copies]
        residents = self._residents
        return (
            victim
            for victim in self._found
            if victim in residents and not victim.in_flight_tokens and not victim.copies
        )

    def choose(self, own_rank: Any, blocks: int) -> list[Request] | None:
        """Victims of lower priority that hold `blocks` blocks together; None without enough."""
        if self._no_more and own_rank >= self._no_more[0] and blocks > self._no_more[1]:
            return None  # looked for already in this step, for somebody of higher priority
        rank = self._policy.rank
        chosen: list[Request] = []
        held = 0
        for victim in self:
            if held >= blocks:
                return chosen
            if rank(victim) > own_rank:
                chosen.append(victim)
                held += len(victim.block_table)
        if held >= blocks:
            return chosen
        self._no_more = (own_rank, held)
        return None
