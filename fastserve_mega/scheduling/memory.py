"""Where the KV of each request is: admission, growth, preemption."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from fastserve_mega.scheduling.cost_model import CostModel
from fastserve_mega.scheduling.kv_blocks import BlockPool
from fastserve_mega.scheduling.policy import Policy
from fastserve_mega.scheduling.prefix_cache import PrefixCache
from fastserve_mega.scheduling.reclaim import Reclaimer
from fastserve_mega.scheduling.request import Place, Request
from fastserve_mega.scheduling.swapping import Swapper
from fastserve_mega.system.config import SwapStrategy

_PAYBACK = 4
"""Time a recomputed request runs before it can be preempted again, in times of its share of a
batch: so recomputing takes at most a fifth of the time, however many requests there are."""


@dataclass(frozen=True, slots=True)
class PoolSizes:
    """Blocks of the pools of every rank, the null blocks included."""

    device_blocks: int
    host_blocks: int
    block_size: int
    """Tokens of a block."""


class Admission(Enum):
    """What became of a request that asked for memory."""

    READY = 0
    """It can run in this step."""
    COMING = 1
    """It has to wait for nothing but a copy or a step that is under way."""
    NO_MEMORY = 2


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

    def __init__(
        self,
        sizes: PoolSizes,
        strategy: SwapStrategy,
        policy: Policy,
        cost_model: CostModel,
        max_batch_size: int,
    ) -> None:
        self.device = BlockPool(sizes.device_blocks)
        self.host = BlockPool(sizes.host_blocks)
        self.block_size = sizes.block_size
        self.prefix_cache = PrefixCache(self.device, self.host, sizes.block_size)
        self.swapper = Swapper(
            device=self.device,
            host=self.host,
            prefix_cache=self.prefix_cache,
            policy=policy,
            strategy=strategy,
            block_size=sizes.block_size,
        )
        self.copies = self.swapper.copies
        self.reclaimer = Reclaimer(self.device, policy, self.swapper, preempts=strategy != "none")
        self._strategy: SwapStrategy = strategy
        self._policy = policy
        self._prefill_s = cost_model.prefill_s
        self._payback = _PAYBACK * max_batch_size
        self._ended: dict[Request, None] = {}
        """Ended while they were in flight or their blocks were being copied."""
        self._step_id = 0

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    @property
    def recomputed_tokens(self) -> int:
        """Tokens whose KV was computed, dropped, and not found again."""
        return self.swapper.recomputed_tokens

    @property
    def preemptions(self) -> int:
        return self.swapper.preemptions

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
        self.reclaimer.begin_step(step_id, now)

    def make_resident(self, request: Request, reserve: int) -> Admission:
        """Admit a request, or bring it back from the host for this very step.

        Args:
            request: not resident and not moving.
            reserve: blocks to leave free for the growth of those running.
        """
        if request.place is Place.HOSTED:
            # It may not have quite left.
            if request.copies:
                return Admission.COMING
            came = self.bring_back(request, reserve, self._step_id)
            return Admission.READY if came else Admission.NO_MEMORY
        if request.block_hashes:
            return self._admit_with_prefix(request, reserve)
        table = self.reclaimer.take(
            request, self._blocks_wanted(request), reserve + self.reclaimer.held_before(request)
        )
        if table is None:
            return Admission.NO_MEMORY
        self._settle(request, table)
        return Admission.READY

    def grow(self, request: Request, tokens: int) -> Admission:
        """Let a resident request hold `tokens` tokens."""
        missing = -(-tokens // self.block_size) - len(request.block_table)
        added = self.reclaimer.take(request, missing, 0)
        if added is None:
            return Admission.NO_MEMORY
        request.block_table.extend(added)
        return Admission.READY

    def bring_back(self, request: Request, reserve: int, precedes_step: int | None) -> bool:
        """Start to copy a hosted request back; False when there is no memory for it now."""
        used = self.blocks_for(request.computed_tokens)
        full = request.computed_tokens // self.block_size
        # What the device still has by its content needs no copy.
        table: list[int | None] = [self.device.share(h) for h in request.block_hashes[:full]]
        table += [None] * (self.blocks_for(request.known_tokens) - len(table))
        filled = self._fill(request, table, reserve)
        if filled is None:
            return False
        copied = [index for index in range(used) if table[index] is None]
        self._settle(request, filled)
        self.swapper.swap_in(
            request,
            [request.host_table[index] for index in copied],
            [filled[index] for index in copied],
            precedes_step,
        )
        return True

    def hold_blocks_for(self, requests: Iterable[Request]) -> None:
        """Keep blocks that become free for these on the host, from the waiting behind them."""
        self.reclaimer.hold(
            (request, self.blocks_for(request.known_tokens))
            for request in requests
            if request.place is Place.HOSTED
        )

    # --- ends ----------------------------------------------------------------------------------

    def copy_done(self, copy_id: int) -> None:
        """All ranks have finished a copy. Copies from before the ranks were lost are ignored."""
        copy = self.copies.done(copy_id)
        if copy is None:
            return
        if copy.request in self._ended:
            self.release(copy.request)
        else:
            self.swapper.finish(copy)
        self.swapper.release(copy)

    def release(self, request: Request) -> None:
        """Take all blocks of an ended request, as soon as nothing uses them any more."""
        if request.copies or request.in_flight_tokens:
            self._ended[request] = None
        else:
            self._ended.pop(request, None)
            self.swapper.free_tables(request)

    def lose_everything(self) -> None:
        """The ranks restarted with empty pools."""
        self.prefix_cache.forget()
        for copy in self.copies.outstanding:
            self.device.free(copy.leaving)
            self.host.free(copy.host_blocks)
        self.copies.forget_all()
        for place in (Place.RESIDENT, Place.HOSTED):
            for request in self._policy.walk(place):
                self.swapper.drop(request)
        for request in self._ended:
            self.swapper.free_tables(request)
        self._ended.clear()

    def check_integrity(self) -> None:
        """Raise RuntimeError unless each block is free or has exactly the owners it should have."""
        hosted = list(self._policy.walk(Place.HOSTED))
        owners = [*self._policy.walk(Place.RESIDENT), *hosted, *self._ended]
        copies = list(self.copies.outstanding)
        device = [block for owner in owners for block in owner.block_table]
        device += [block for copy in copies for block in copy.leaving]
        self.device.check_integrity(device)
        host = [block for owner in owners for block in owner.host_table]
        host += [block for copy in copies for block in copy.host_blocks]
        self.host.check_integrity(host)
        for request in hosted:
            if request.block_table or len(request.host_table) < self.blocks_for(
                request.computed_tokens
            ):
                raise RuntimeError(f"request {request.request_id} is on the host only in part")

    # --- within --------------------------------------------------------------------------------

    def _admit_with_prefix(self, request: Request, reserve: int) -> Admission:
        """Take the leading blocks that exist, from the host if need be, and room for the rest."""
        cache = self.prefix_cache
        found = cache.find(request)
        if cache.is_being_computed(request, len(found.table)):
            cache.give_up(found)
            return Admission.COMING
        wanted = self._blocks_wanted(request) - len(found.table)
        filled = self._fill(
            request, found.table + [None] * wanted, reserve + self.reclaimer.held_before(request)
        )
        if filled is None:
            self.host.free(found.host_blocks)
            return Admission.NO_MEMORY
        request.computed_tokens = len(found.table) * self.block_size
        self._settle(request, filled)
        cache.admitted(request, found)
        if not found.host_blocks:
            return Admission.READY
        targets = [filled[index] for index, block in enumerate(found.table) if block is None]
        ahead = self._strategy == "proactive"
        step = None if ahead else self._step_id
        self.swapper.swap_in(request, found.host_blocks, targets, step, found.host_blocks)
        return Admission.COMING if ahead else Admission.READY

    def _fill(self, request: Request, table: list[int | None], reserve: int) -> list[int] | None:
        """Replace each None by a block of its own; None, and all given up, without memory."""
        fresh = self.reclaimer.take(request, table.count(None), reserve)
        if fresh is None:
            self.device.free([block for block in table if block is not None])
            return None
        fresh.reverse()
        return [fresh.pop() if block is None else block for block in table]

    def _blocks_wanted(self, request: Request) -> int:
        if self._strategy == "none":
            return self.blocks_for(request.prompt_tokens + request.max_tokens)
        return self.blocks_for(request.known_tokens)

    def _settle(self, request: Request, table: list[int]) -> None:
        request.block_table = table
        request.told_blocks = 0
        request.sampled_since_admission = False
        if request.dropped_tokens:
            self._recompute(request)
        self._policy.put(request, Place.RESIDENT)

    def _recompute(self, request: Request) -> None:
        """What was dropped has to be prefilled again, and the time for it to be paid back."""
        tokens = max(request.dropped_tokens - request.computed_tokens, 0)
        request.dropped_tokens = 0
        self.swapper.recomputed_tokens += tokens
        request.unpaid_s = self._payback * self._prefill_s(tokens) if tokens else 0.0
