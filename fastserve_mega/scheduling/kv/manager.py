"""Where the KV of each request is: admission, growth, preemption."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastserve_mega.scheduling.cost_model import CostModel
from fastserve_mega.scheduling.kv.admission import KvProjection, MemoryOutcome, StartedRequests
from fastserve_mega.scheduling.kv.pool import BlockPool, PoolSizes, PrefixCache
from fastserve_mega.scheduling.kv.reclaim import Reclaimer
from fastserve_mega.scheduling.kv.swapper import Swapper
from fastserve_mega.scheduling.policies.policy import Policy
from fastserve_mega.scheduling.request import BlockHashes, Place, Request, RequestStatus
from fastserve_mega.system.config import SchedulerConfig, SwapStrategy
from fastserve_mega.types import BlockHash

_PAYBACK = 4
"""How much longer than its recomputation (with `reactive`: two copies) a request runs before one
that has no device blocks preempts it, in shares of a batch: at most a fifth of the time is lost."""

_WHILE_COPIED = {True: RequestStatus.SWAPPING_IN, False: RequestStatus.READY}
"""By whether no step waits: the status of a request that KV is copied to."""


class KvManager:
    """Gives blocks to requests, and takes them from those of lower priority when none are free.

    A request is admitted with the blocks of all its known tokens at once and keeps them at least
    until it has yielded a token. So each admission makes progress, and two requests in the middle
    of their prefills can never wait for each other's blocks.

    What a preempted request loses depends on the strategy:

    - `proactive`, `reactive`: its KV moves to host blocks. Blocks whose copy is clean are free at
      once, the others when all ranks have reported the copy done. With `reactive` the step that
      needs the blocks waits for the copies instead (`BlockCopy.precedes_step`), so that who has
      blocks keeps them until it has made up for that.
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
        config: SchedulerConfig,
    ) -> None:
        is_projected = config.admission == "projected"
        self.device = BlockPool(sizes.device_blocks)
        self.host = BlockPool(sizes.host_blocks)
        self.block_size = sizes.block_size
        self.prefix_cache = PrefixCache(self.device, self.host, sizes.block_size)
        self.shares_prefixes = False
        """Whether a request ever came with hashes: the prefix cache is on."""
        self.swapper = Swapper(
            device=self.device,
            host=self.host,
            prefix_cache=self.prefix_cache,
            policy=policy,
            strategy=strategy,
            block_size=sizes.block_size,
            advances_dropped=is_projected,
        )
        self.copies = self.swapper.copies
        self.reclaimer = Reclaimer(
            self.device,
            policy,
            self.swapper,
            preempts=strategy != "none",
            drops=not is_projected,
        )
        self.runnable_places: tuple[Place, ...] = (Place.WAITING, Place.RESIDENT)
        """Where the requests are that a batch may take, the waiting first."""
        if strategy == "reactive":  # the others come back before their step, and not at it
            self.runnable_places += (Place.SWAPPED,)
        self.grows_ahead = sizes.grows_ahead
        self._many_free = config.max_batch_size
        self._strategy: SwapStrategy = strategy
        self._queues = policy.queues
        self._prefill_s = cost_model.prefill_s
        self._payback = _PAYBACK * config.max_batch_size
        self.unreleased: dict[Request, None] = {}
        """Requests that ended while they were in flight or their blocks were being copied."""
        self._step_id = 0
        self._now = 0.0
        limit_blocks = self.device.capacity
        if strategy in ("proactive", "reactive"):
            limit_blocks += self.host.capacity
        self.started = StartedRequests(
            queues=policy.queues,
            device=self.device,
            swapper=self.swapper,
            projection=KvProjection(config.max_batch_size),
            limit_blocks=limit_blocks if is_projected and strategy != "none" else None,
            block_size=sizes.block_size,
        )

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def look_up(self, request: Request, block_hashes: Sequence[BlockHash]) -> None:
        """Take in the hashes of a request that arrived; see how much of it exists already."""
        request.kv.block_hashes = BlockHashes(block_hashes)
        self.shares_prefixes |= bool(block_hashes)
        request.kv.num_cached_tokens = self.prefix_cache.known_tokens(request)

    # --- one step ------------------------------------------------------------------------------

    def begin_step(self, step_id: int, now: float) -> None:
        """Forget what was found out for the step before."""
        self._step_id = step_id
        self.swapper.preempted.clear()
        self._now = now
        self.reclaimer.begin_step(step_id, now)

    def make_resident(
        self, request: Request, reserve: int, *, leaves_room: bool = False
    ) -> MemoryOutcome:
        """Admit a request, or bring it back from the host for this very step.

        Args:
            request: not resident and not moving.
            reserve: blocks to leave free for the growth of those running.
            leaves_room: whether it is started only where the device holds all that is started.
        """
        if request.place is Place.SWAPPED:
            # It may not have quite left.
            if request.kv.num_copies:
                return MemoryOutcome.COMING
            came = self.bring_back(request, reserve, self._step_id)
            return MemoryOutcome.READY if came else MemoryOutcome.NO_MEMORY
        if request.kv.block_hashes:
            return self._admit_with_prefix(request, reserve, leaves_room)
        wanted = self._blocks_wanted(request)
        if not self.started.may_start(request, wanted, leaves_room=leaves_room):
            return MemoryOutcome.NOT_STARTED
        table = self.reclaimer.take(request, wanted, reserve + self.reclaimer.held_before(request))
        if table is None:
            return MemoryOutcome.NO_MEMORY
        self._settle(request, table, RequestStatus.READY)
        return MemoryOutcome.READY

    def filled(self, request: Request, block_hash: BlockHash) -> None:
        """Take in the hash of a block that a new token filled."""
        request.kv.block_hashes.append(block_hash)
        request.steady_until = 0

    def grow(self, request: Request, tokens: int) -> MemoryOutcome:
        """Let a resident request hold `tokens` tokens."""
        missing = -(-tokens // self.block_size) - len(request.kv.block_table)
        added = self.reclaimer.take(request, missing, 0)
        if added is None:
            return MemoryOutcome.NO_MEMORY
        request.kv.block_table.extend(added)
        return MemoryOutcome.READY

    def grow_ahead(self, request: Request) -> None:
        """Give a resident whose blocks this step fills the next one, where all could have one."""
        last = request.num_prompt_tokens + request.max_tokens - 1  # is not computed any more
        if request.num_tokens < last and self.device.free_count > self._many_free:
            request.kv.block_table.extend(self.device.allocate(1))

    def take_unsent(self, request: Request) -> tuple[int, ...]:
        """Return the device blocks of a request that the workers do not know, for the next plan."""
        kv = request.kv
        unsent = tuple(kv.block_table[kv.num_sent_blocks :])
        kv.num_sent_blocks = len(kv.block_table)
        return unsent

    def bring_back(self, request: Request, reserve: int, precedes_step: int | None) -> bool:
        """Start to copy a swapped request back; False when there is no memory for it now."""
        used = self.blocks_for(request.num_computed_tokens)
        full = request.num_computed_tokens // self.block_size
        # What the device still has by its content needs no copy.
        table: list[int | None] = [self.device.share(h) for h in request.kv.block_hashes[:full]]
        table += [None] * (self.blocks_for(request.num_tokens) - len(table))
        filled = self._fill(request, table, reserve)
        if filled is None:
            return False
        copied = [index for index in range(used) if table[index] is None]
        self._settle(request, filled, _WHILE_COPIED[precedes_step is None])
        self.swapper.swap_in(
            request,
            [request.kv.host_table[index] for index in copied],
            [filled[index] for index in copied],
            precedes_step,
        )
        return True

    def hold_blocks_for(self, requests: Iterable[Request]) -> None:
        """Keep blocks that become free for these on the host, from the waiting behind them."""
        self.reclaimer.hold(
            (request, self.blocks_for(request.num_tokens))
            for request in requests
            if request.place is Place.SWAPPED
        )

    # --- ends ----------------------------------------------------------------------------------

    def copy_done(self, copy_id: int, now: float) -> None:
        """Take in that all ranks have finished a copy, perhaps one from before they were lost."""
        copy = self.copies.done(copy_id, now)
        if copy is None:
            return
        if copy.request in self.unreleased:
            self.release(copy.request)
        else:
            self.swapper.finish(copy)
        self.swapper.release(copy)

    def release(self, request: Request) -> None:
        """Take all blocks of an ended request, as soon as nothing uses them any more."""
        self.swapper.is_dropped_no_more(request)
        if request.kv.num_copies or request.num_scheduled_tokens:
            self.unreleased[request] = None
        else:
            self.unreleased.pop(request, None)
            self.swapper.free_tables(request)

    def lose_everything(self) -> None:
        """The ranks restarted with empty pools."""
        self.prefix_cache.forget()
        for copy in self.copies.outstanding:
            self.device.free(copy.leaving)
            self.host.free(copy.host_blocks)
        self.copies.forget_all()
        for place in (Place.RESIDENT, Place.SWAPPED):
            for request in self._queues.walk(place):
                self.swapper.drop(request)
        for request in self.unreleased:
            self.swapper.free_tables(request)
        self.unreleased.clear()

    # --- within --------------------------------------------------------------------------------

    def _admit_with_prefix(
        self, request: Request, reserve: int, leaves_room: bool
    ) -> MemoryOutcome:
        """Take the leading blocks that exist, from the host if need be, and room for the rest."""
        cache = self.prefix_cache
        found, host_blocks = cache.find(request)
        if cache.is_being_computed(request, len(found)):
            cache.give_up(found, host_blocks)
            return MemoryOutcome.COMING
        wanted = self._blocks_wanted(request) - len(found)
        if not self.started.may_start(request, wanted, leaves_room=leaves_room):
            cache.give_up(found, host_blocks)
            return MemoryOutcome.NOT_STARTED
        filled = self._fill(
            request, found + [None] * wanted, reserve + self.reclaimer.held_before(request)
        )
        if filled is None:
            self.host.free(host_blocks)
            return MemoryOutcome.NO_MEMORY
        request.num_computed_tokens = len(found) * self.block_size
        is_ahead = self._strategy == "proactive" and bool(host_blocks)
        step = None if is_ahead else self._step_id
        self._settle(request, filled, _WHILE_COPIED[step is None])
        cache.admitted(request, len(found))
        if host_blocks:
            request.kv.num_published_blocks = 0
            targets = [filled[index] for index, block in enumerate(found) if block is None]
            self.swapper.swap_in(request, host_blocks, targets, step, host_blocks)
        return MemoryOutcome.COMING if is_ahead else MemoryOutcome.READY

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
            return self.blocks_for(request.num_prompt_tokens + request.max_tokens)
        return self.blocks_for(request.num_tokens)

    def _settle(self, request: Request, table: list[int], status: RequestStatus) -> None:
        request.kv.block_table = table
        request.kv.num_sent_blocks = 0
        request.kv.resident_since = self._now
        request.has_progressed = False
        request.steady_until = 0
        self.swapper.is_dropped_no_more(request)
        dropped, request.kv.num_dropped_tokens = request.kv.num_dropped_tokens, 0
        is_reactive = self._strategy == "reactive"
        if dropped or is_reactive:
            tokens = max(dropped - request.num_computed_tokens, 0)
            self.swapper.recomputed_tokens += tokens
            cost_s = self._prefill_s(tokens) if tokens else 0.0
            if is_reactive:  # steps wait while its KV leaves and comes back
                cost_s = max(cost_s, 2 * len(table) * self.copies.block_s)
            request.preemption_credit_s = self._payback * cost_s
        self._queues.put(request, status)
