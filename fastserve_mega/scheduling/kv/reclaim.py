"""Finds device blocks for a request, if need be those of requests with lower priority.

`Victims` says whose, `Reclaimer` takes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from fastserve_mega.scheduling.kv.pool import BlockPool
from fastserve_mega.scheduling.kv.swapper import Swapper
from fastserve_mega.scheduling.policies.policy import Policy
from fastserve_mega.scheduling.request import Place, Request

_LOOKED_AT = 64
"""Residents among which a step looks for victims: those of lowest priority. With more of them
nobody notices who exactly it is, and a step's cost does not grow with the residents."""


class Victims:
    """The residents that may be preempted in this step, whoever will run last (ENST) first."""

    def __init__(self, policy: Policy, device: BlockPool) -> None:
        self._policy = policy
        self._queues = policy.queues
        self._device = device
        self._found: list[Request] | None = None
        self._now = 0.0

    def begin_step(self, now: float) -> None:
        """Forget who was found in the step before."""
        self._found = None
        self._now = now

    def __iter__(self) -> Iterator[Request]:
        """Iterate over those whose preemption costs nobody anything that is not paid back."""
        return (victim for victim in self._all() if victim.preemption_credit_s <= 0)

    def _all(self) -> Iterator[Request]:
        if self._found is None:
            latest = self._policy.latest_residents(self._now, _LOOKED_AT)
            self._found = [r for r in latest if r.has_progressed and not r.kv.num_copies]
            self._found.sort(key=_is_unpaid)
        return (
            victim
            for victim in self._found
            if victim.kv.block_table
            and not victim.num_scheduled_tokens
            and not victim.kv.num_copies
        )

    def choose(
        self, request: Request, blocks: int, host_room: int | None, turn_s: float = 0.0
    ) -> tuple[list[Request], int]:
        """Victims of lower priority that hold `blocks` blocks alone together, or all of them.

        Whoever runs already may take them from anybody, else all could wait for each other: last
        from those whose KV is lost with it. Who is to be admitted, only from those who have paid
        back, and whose KV is not lost.

        Args:
            request: gets the blocks.
            blocks: how many it needs.
            host_room: blocks that the host has for victims; None when their KV may be dropped.
            turn_s: a victim has been resident for this time for each of its blocks.

        Returns:
            The victims, and the blocks that come free with them.
        """
        own_rank = self._queues.rank(request)
        candidates = self._all() if request.place is Place.RESIDENT else self
        rank = self._queues.rank
        chosen: list[Request] = []
        losing: list[Request] = []
        held = 0
        for victim in candidates:
            if held >= blocks:
                break
            held_s = self._now - victim.kv.resident_since
            if rank(victim) > own_rank and held_s >= turn_s * len(victim.kv.block_table):
                if host_room is not None:
                    if len(victim.kv.block_table) > host_room:
                        losing.append(victim)
                        continue
                    host_room -= len(victim.kv.block_table)
                chosen.append(victim)
                held += self._device.exclusive(victim.kv.block_table)
        if request.place is Place.RESIDENT:
            for victim in losing:
                if held >= blocks:
                    break
                chosen.append(victim)
                held += self._device.exclusive(victim.kv.block_table)
        return chosen, held


class Reclaimer:
    """Allocates blocks; preempts whoever runs last when none are free."""

    def __init__(
        self,
        device: BlockPool,
        policy: Policy,
        swapper: Swapper,
        *,
        preempts: bool,
        drops: bool,
    ) -> None:
        """Start with nothing held.

        Args:
            device: where blocks are found.
            policy: says whose.
            swapper: takes them.
            preempts: whether anybody is preempted at all.
            drops: whether KV is dropped, to be computed again, so that somebody else comes first.
        """
        self.victims = Victims(policy, device)
        self._device = device
        self._queues = policy.queues
        self._swapper = swapper
        self._copies = swapper.copies
        self._preempts = preempts
        self._drops = drops
        self._step_id = 0
        self._claimed = 0
        """Leaving blocks that somebody in this step waits for."""
        self._attainable: dict[bool, tuple[Any, int]] = {}
        """A rank, and what requests of lower priority can hope for in this step at most; True for
        residents, who may take blocks from more victims than those that are to be admitted."""
        self._held: list[tuple[Request, int]] = []
        """Requests that come back from the host soon, and the blocks that takes."""
        self._held_ranks: list[tuple[Any, int, Request]] | None = None
        """What `_held` has, with ranks, once somebody has asked in this step."""

    def begin_step(self, step_id: int, now: float) -> None:
        """Forget what was found out for the step before."""
        self._step_id = step_id
        self._claimed = 0
        self._attainable.clear()
        self._held_ranks = None
        self.victims.begin_step(now)

    def take(self, request: Request, count: int, reserve: int) -> list[int] | None:
        """Allocate `count` blocks and leave `reserve` free; None when that cannot be now."""
        device, needed = self._device, count + reserve
        shortage = needed - device.free_count
        if shortage > 0:
            if self._is_beyond_reach(request, needed):
                return None
            self._preempt_below(request, shortage)
            if needed > device.free_count:
                return None
        return device.allocate(count)

    def growth_ended(self, resident: Request) -> bool:
        """Whether neither a resident nor anybody behind it can get a single block in this step."""
        return self._is_beyond_reach(resident, 1)

    def hold(self, needs: Iterable[tuple[Request, int]]) -> None:
        """Keep blocks that come free for requests on the host, as many as each needs."""
        self._held = list(needs)

    def held_before(self, request: Request) -> int:
        """Blocks that are kept for those of higher priority than a waiting request."""
        if not self._held:
            return 0
        rank = self._queues.rank
        if self._held_ranks is None:  # some may have ended or lost their KV since
            self._held_ranks = [
                (rank(held), blocks, held)
                for held, blocks in self._held
                if not held.is_finished and held.place is Place.SWAPPED
            ]
        own_rank, total = rank(request), 0
        for held_rank, blocks, held in self._held_ranks:
            if held_rank < own_rank and held.place is Place.SWAPPED:
                total += blocks
        return total

    def swap_out_for(self, blocks: int) -> None:
        """Make this many device blocks free soon, from those who will run last."""
        shortage = blocks - self._device.free_count - self._copies.leaving_blocks
        host_room = self._host_room()
        for victim in self.victims:
            if shortage <= 0:
                return
            if host_room is not None:
                if len(victim.kv.block_table) > host_room:
                    continue
                host_room -= len(victim.kv.block_table)
            shortage -= self._device.exclusive(victim.kv.block_table)
            self._swapper.preempt(victim, None, self._step_id)

    def exchange(self, request: Request, blocks: int, turn_s: float) -> None:
        """Preempt residents of lower priority for a request on the host, or none.

        Args:
            request: comes back when the blocks are free.
            blocks: how many it needs.
            turn_s: a victim has been resident for this time for each of its blocks.
        """
        shortage = blocks - self._device.free_count - self._copies.leaving_blocks
        chosen, held = self.victims.choose(request, shortage, self._host_room(), turn_s)
        if 0 < shortage <= held:
            for victim in chosen:
                self._swapper.preempt(victim, request, self._step_id)

    def _host_room(self) -> int | None:
        """Blocks that the host has for victims; None when their KV may be dropped."""
        return None if self._drops else self._swapper.host_room

    def _is_beyond_reach(self, request: Request, blocks: int) -> bool:
        """Whether victims were sought in vain in this step for somebody who could have more."""
        found = self._attainable.get(request.place is Place.RESIDENT)
        if found is None:
            return False
        rank, attainable = found
        return blocks > attainable and self._queues.rank(request) >= rank

    def _preempt_below(self, request: Request, shortage: int) -> None:
        """Preempt requests of lower priority to free `shortage` blocks, or none at all.

        Blocks that are leaving already and that nobody in this step waits for count as well.
        """
        if not self._preempts:
            return
        free = self._device.free_count
        coming = min(max(self._copies.leaving_blocks - self._claimed, 0), shortage)
        chosen, held = self.victims.choose(request, shortage - coming, self._host_room())
        if held < shortage - coming:
            found = self._queues.rank(request), free + coming + held
            self._attainable[request.place is Place.RESIDENT] = found
            return
        if chosen and self._attainable:
            # Between clients a step does not go by rank: whoever sought in vain before may find
            # more now if it could not have had these victims.
            own_rank = self._queues.rank(request)
            self._attainable = {
                key: found for key, found in self._attainable.items() if found[0] <= own_rank
            }
        for victim in chosen:
            self._swapper.preempt(victim, request, self._step_id)
        self._claimed += max(shortage - (self._device.free_count - free), 0)


def _is_unpaid(request: Request) -> bool:
    return request.preemption_credit_s > 0
