"""Where the KV of each request is: admission, growth, preemption, and the copies between pools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from fastserve_mega.config import SwapStrategy
from fastserve_mega.plan import CopyDirection
from fastserve_mega.scheduling.copies import Copy, CopyLedger
from fastserve_mega.scheduling.kv_blocks import BlockPool
from fastserve_mega.scheduling.policy import Policy
from fastserve_mega.scheduling.request import Place, Request
from fastserve_mega.scheduling.victims import Victims

_UNBOUNDED = 1 << 62
_LOOKED_AT = 64
"""Residents whose copies on the host are looked at, when it is full."""


@dataclass(frozen=True, slots=True)
class PoolSizes:
    """Blocks of the pools of every rank, the null blocks included."""

    device_blocks: int
    host_blocks: int
    block_size: int
    """Tokens of a block."""


class KvMemory:
    """Gives blocks to requests, and takes them from those of lower priority when none are free.

    A request is admitted with the blocks of all its known tokens at once and keeps them at least
    until it has yielded a token. So each admission makes progress, and two requests in the middle
    of their prefills can never wait for each other's blocks.

    What a preempted request loses depends on the strategy:

    - `proactive`, `reactive`: its KV moves to host blocks. Blocks whose copy is clean are free at
      once, the others when all ranks have reported the copy done. With `reactive` the step that
      needs the blocks waits for the copies instead (`BlockCopy.precedes_step`).
    - `recompute`: its KV is dropped and prefilled again later. The others fall back to this when
      the host pool is exhausted.
    - `none`: nobody is preempted; a request is admitted with the blocks of its longest answer.
    """

    def __init__(self, sizes: PoolSizes, strategy: SwapStrategy, policy: Policy) -> None:
        self.device = BlockPool(sizes.device_blocks)
        self.host = BlockPool(sizes.host_blocks)
        self.recomputed_tokens = 0
        """Tokens whose KV was computed and dropped."""
        self.preemptions = 0
        self.copies = CopyLedger()
        self.block_size = sizes.block_size
        self._strategy: SwapStrategy = strategy
        self._policy = policy
        self.victims = Victims(policy)
        self.attainable_blocks = _UNBOUNDED
        """What a request of lower priority than the last one that found no memory in this step can
        hope for at most."""
        self._ended: dict[Request, None] = {}
        """Ended while they were in flight or their blocks were being copied."""
        self._step_id = 0
        self._claimed = 0
        """Leaving blocks that somebody in this step waits for."""
        self._held: tuple[Any, int] | None = None

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    @property
    def runnable_places(self) -> tuple[Place, ...]:
        """Where the requests are that a batch may take, the waiting first.

        With `proactive`, those on the host come back before their step, and not at it.
        """
        if self._strategy == "reactive":
            return Place.WAITING, Place.RESIDENT, Place.HOSTED
        return Place.WAITING, Place.RESIDENT

    # --- one step ------------------------------------------------------------------------------

    def begin_step(self, step_id: int, now: float) -> None:
        """Forget what was found out for the step before."""
        self._step_id = step_id
        self._claimed = 0
        self.attainable_blocks = _UNBOUNDED
        self.victims.begin_step(now)

    def make_resident(self, request: Request, reserve: int) -> bool:
        """Admit a request, or bring it back from the host.

        Args:
            request: not resident and not moving.
            reserve: blocks to leave free for the growth of those running.

        Returns:
            Whether it can run in this step; if not, there is no memory for it or its KV is still
            on the way.
        """
        if self.blocks_for(request.known_tokens) + reserve > self.attainable_blocks:
            return False
        if request.place is Place.HOSTED:
            # It may not have quite left.
            return not request.copies and self.swap_in(request, reserve, self._step_id)
        if self._held and self._policy.rank(request) > self._held[0]:
            reserve += self._held[1]
        tokens = request.known_tokens
        if self._strategy == "none":
            tokens = request.prompt_tokens + request.max_tokens
        table = self._take(request, self.blocks_for(tokens), reserve)
        if table is None:
            return False
        self._settle(request, table)
        return True

    def grow(self, request: Request, tokens: int) -> bool:
        """Let a resident request hold `tokens` tokens; False when there is no memory for that."""
        missing = -(-tokens // self.block_size) - len(request.block_table)
        if missing <= 0:
            return True
        added = self._take(request, missing, 0)
        if added is None:
            return False
        request.block_table.extend(added)
        return True

    # --- moving --------------------------------------------------------------------------------

    def swap_in(self, request: Request, reserve: int, precedes_step: int | None) -> bool:
        """Start to bring a request back; False when there is no memory for it in this step."""
        table = self._take(request, self.blocks_for(request.known_tokens), reserve)
        if table is None:
            return False
        used = self.blocks_for(request.computed_tokens)
        self._settle(request, table)
        request.moving = precedes_step is None
        full = request.computed_tokens // self.block_size
        copy = Copy(request, CopyDirection.SWAP_IN, leaving=(), makes_clean=full)
        self.copies.start(copy, request.host_table[:used], table[:used], precedes_step)
        return True

    def hold_blocks_for(self, request: Request | None) -> None:
        """Keep blocks that become free for this request on the host, from those behind it."""
        self._held = None
        if request is not None:
            blocks = self.blocks_for(request.known_tokens)
            self._held = (self._policy.rank(request), blocks)

    def write_through(self, request: Request, limit: int) -> int:
        """Copy up to `limit` full blocks ahead of need; returns how many."""
        dirty = request.computed_tokens // self.block_size - request.clean_blocks
        count = min(dirty, limit, self.host.free_count)
        if count <= 0:
            return 0
        clean = request.clean_blocks
        self._copy_out(request, request.block_table[clean : clean + count], (), None)
        return count

    def swap_out_for(self, blocks: int) -> None:
        """Make this many device blocks free soon, from those who will run last."""
        shortage = blocks - self.device.free_count - self.copies.leaving_blocks
        for victim in self.victims:
            if shortage <= 0:
                return
            shortage -= len(victim.block_table)
            self._preempt(victim)

    def copy_done(self, copy_id: int) -> None:
        """All ranks have finished a copy. Copies from before the ranks were lost are ignored."""
        copy = self.copies.done(copy_id)
        if copy is None:
            return
        request = copy.request
        self.device.free(copy.leaving)
        if request in self._ended:
            self.release(request)
            return
        request.clean_blocks = copy.makes_clean
        if copy.direction is CopyDirection.SWAP_IN:
            # The last block grows again, so its copy on the host is worth nothing.
            self.host.free(request.host_table[copy.makes_clean :])
            del request.host_table[copy.makes_clean :]
            request.moving = False
        elif request.place is Place.HOSTED:
            request.moving = False

    # --- ends ----------------------------------------------------------------------------------

    def release(self, request: Request) -> None:
        """Take all blocks of an ended request, as soon as nothing uses them any more."""
        if request.copies or request.in_flight_tokens:
            self._ended[request] = None
        else:
            self._ended.pop(request, None)
            self._free_tables(request)

    def lose_everything(self) -> None:
        """The ranks restarted with empty pools."""
        for copy in self.copies.outstanding:
            self.device.free(copy.leaving)
        self.copies.forget_all()
        for place in (Place.RESIDENT, Place.HOSTED):
            for request in self._policy.walk(place):
                self._drop(request)
        for request in self._ended:
            self._free_tables(request)
        self._ended.clear()

    # --- looking -------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise RuntimeError unless each block is free or has exactly one owner."""
        hosted = list(self._policy.walk(Place.HOSTED))
        owners = [*self._policy.walk(Place.RESIDENT), *hosted, *self._ended]
        device = [block for owner in owners for block in owner.block_table]
        device += [block for copy in self.copies.outstanding for block in copy.leaving]
        self.device.check_integrity(device)
        self.host.check_integrity([block for owner in owners for block in owner.host_table])
        for request in hosted:
            if request.block_table or len(request.host_table) < self.blocks_for(
                request.computed_tokens
            ):
                raise RuntimeError(f"request {request.request_id} is on the host only in part")

    # --- within --------------------------------------------------------------------------------

    def _settle(self, request: Request, table: list[int]) -> None:
        request.block_table = table
        request.told_blocks = 0
        request.sampled_since_admission = False
        self._policy.put(request, Place.RESIDENT)

    def _take(self, request: Request, count: int, reserve: int) -> list[int] | None:
        shortage = count + reserve - self.device.free_count
        if shortage > 0:
            self._preempt_below(request, shortage)
            if count + reserve > self.device.free_count:
                return None
        return self.device.allocate(count)

    def _preempt_below(self, request: Request, shortage: int) -> None:
        """Preempt requests of lower priority to free `shortage` blocks, or none at all.

        Blocks that are leaving already and that nobody in this step waits for count as well.
        """
        if self._strategy == "none":
            return
        leaving = self.copies.leaving_blocks
        coming = min(max(leaving - self._claimed, 0), shortage)
        chosen, held = self.victims.choose(self._policy.rank(request), shortage - coming)
        if held < shortage - coming:
            self.attainable_blocks = self.device.free_count + coming + held
            return
        for victim in chosen:
            self._preempt(victim)
        self._claimed += coming + self.copies.leaving_blocks - leaving

    def _preempt(self, victim: Request) -> None:
        self.preemptions += 1
        used = self.blocks_for(victim.computed_tokens)
        dirty = used - victim.clean_blocks
        if self._strategy == "recompute" or not self._make_host_room(victim, dirty):
            self._drop(victim)
            return
        self._policy.put(victim, Place.HOSTED)
        table, victim.block_table = victim.block_table, []
        clean = victim.clean_blocks
        self.device.free(table[:clean])
        self.device.free(table[used:])
        if dirty:
            leaving = tuple(table[clean:used])
            reactive = self._strategy == "reactive"
            victim.moving = not reactive
            self._copy_out(victim, leaving, leaving, self._step_id if reactive else None)

    def _make_host_room(self, victim: Request, count: int) -> bool:
        """Free host blocks for the victim's, if others need theirs less.

        First the copies of requests that are on the device as well, then the KV of those on the
        host that will run after the victim.
        """
        host = self.host
        if host.free_count >= count:
            return True
        if count > host.capacity:
            return False
        # Those who run first do not need theirs soon.
        for resident in islice(self._policy.walk(Place.RESIDENT), _LOOKED_AT):
            if resident is not victim and resident.host_table and not resident.copies:
                host.free(resident.host_table)
                resident.host_table = []
                resident.clean_blocks = 0
                if host.free_count >= count:
                    return True
        rank = self._policy.rank(victim)
        for hosted in self._policy.walk_back(Place.HOSTED):
            if host.free_count >= count or self._policy.rank(hosted) < rank:
                break
            if not hosted.copies:
                self._drop(hosted)
        return host.free_count >= count

    def _drop(self, request: Request) -> None:
        """Give up the KV of a request that is not copied just now; it is prefilled again."""
        self.recomputed_tokens += request.computed_tokens
        self._free_tables(request)
        self._policy.put(request, Place.WAITING)

    def _copy_out(
        self,
        request: Request,
        sources: Sequence[int],
        leaving: tuple[int, ...],
        precedes_step: int | None,
    ) -> None:
        targets = self.host.allocate(len(sources))
        request.host_table.extend(targets)
        if precedes_step is not None:
            # The step waits for the copy on every rank, so its blocks can be given away now.
            self.device.free(leaving)
            leaving = ()
        clean = len(request.host_table)
        copy = Copy(request, CopyDirection.SWAP_OUT, leaving=leaving, makes_clean=clean)
        self.copies.start(copy, sources, targets, precedes_step)

    def _free_tables(self, request: Request) -> None:
        self.device.free(request.block_table)
        self.host.free(request.host_table)
        request.block_table = []
        request.host_table = []
        request.clean_blocks = 0
        request.computed_tokens = 0
        request.moving = False
