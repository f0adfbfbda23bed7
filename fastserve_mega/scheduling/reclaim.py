"""Finds device blocks for a request, if need be those of requests with lower priority."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastserve_mega.scheduling.kv_blocks import BlockPool
from fastserve_mega.scheduling.policy import Policy
from fastserve_mega.scheduling.request import Place, Request
from fastserve_mega.scheduling.swapping import Swapper
from fastserve_mega.scheduling.victims import Victims


class Reclaimer:
    """Allocates blocks; preempts whoever runs last when none are free."""

    def __init__(
        self, device: BlockPool, policy: Policy, swapper: Swapper, *, preempts: bool
    ) -> None:
        self.victims = Victims(policy, device)
        self._device = device
        self._policy = policy
        self._swapper = swapper
        self._copies = swapper.copies
        self._preempts = preempts
        self._step_id = 0
        self._claimed = 0
        """Leaving blocks that somebody in this step waits for."""
        self._attainable: tuple[Any, int] | None = None
        """A rank, and what requests of lower priority can hope for in this step at most."""
        self._held: list[tuple[Request, int]] = []
        """Who comes back from the host soon, and the blocks that takes."""

    def begin_step(self, step_id: int, now: float) -> None:
        """Forget what was found out for the step before."""
        self._step_id = step_id
        self._claimed = 0
        self._attainable = None
        self.victims.begin_step(now)

    def take(self, request: Request, count: int, reserve: int) -> list[int] | None:
        """Allocate `count` blocks and leave `reserve` free; None when that cannot be now."""
        shortage = count + reserve - self._device.free_count
        if shortage > 0:
            if self._is_beyond_reach(request, count + reserve):
                return None
            self._preempt_below(request, shortage)
            if count + reserve > self._device.free_count:
                return None
        return self._device.allocate(count)

    def hold(self, needs: Iterable[tuple[Request, int]]) -> None:
        """Keep blocks that come free for requests on the host, as many as each needs."""
        self._held = list(needs)

    def held_before(self, request: Request) -> int:
        """Blocks that are kept for those of higher priority than a waiting request."""
        if not self._held:
            return 0
        rank = self._policy.rank
        own_rank = rank(request)
        return sum(
            blocks
            for held, blocks in self._held
            # It may have ended or lost its KV since.
            if held.place is Place.HOSTED and not held.ended and rank(held) < own_rank
        )

    def swap_out_for(self, blocks: int) -> None:
        """Make this many device blocks free soon, from those who will run last."""
        shortage = blocks - self._device.free_count - self._copies.leaving_blocks
        for victim in self.victims:
            if shortage <= 0:
                return
            shortage -= self._device.exclusive(victim.block_table)
            self._swapper.preempt(victim, self._step_id)

    def _is_beyond_reach(self, request: Request, blocks: int) -> bool:
        """Whether victims were sought in vain in this step for somebody who could have more."""
        if self._attainable is None or request.place is Place.RESIDENT:
            return False
        rank, attainable = self._attainable
        return blocks > attainable and self._policy.rank(request) >= rank

    def _preempt_below(self, request: Request, shortage: int) -> None:
        """Preempt requests of lower priority to free `shortage` blocks, or none at all.

        Blocks that are leaving already and that nobody in this step waits for count as well.
        """
        if not self._preempts:
            return
        leaving = self._copies.leaving_blocks
        coming = min(max(leaving - self._claimed, 0), shortage)
        chosen, held = self.victims.choose(request, shortage - coming)
        if held < shortage - coming:
            free = self._device.free_count
            self._attainable = (self._policy.rank(request), free + coming + held)
            return
        for victim in chosen:
            self._swapper.preempt(victim, self._step_id)
        self._claimed += coming + self._copies.leaving_blocks - leaving
