"""Moves the KV of requests between the pools, or drops it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from fastserve_mega.plan import CopyDirection
from fastserve_mega.scheduling.kv.copies import Copy, CopyLedger
from fastserve_mega.scheduling.kv.pool import BlockPool, PrefixCache
from fastserve_mega.scheduling.policies.policy import Policy
from fastserve_mega.scheduling.request import Place, Request, RequestStatus
from fastserve_mega.system.config import SwapStrategy
from fastserve_mega.types import BlockHash

_LOOKED_AT = 64
"""Residents whose copies on the host are looked at, when it is full."""


class Swapper:
    """What becomes of the KV of a preempted request, by the strategy of `KvManager`."""

    def __init__(
        self,
        *,
        device: BlockPool,
        host: BlockPool,
        prefix_cache: PrefixCache,
        policy: Policy,
        strategy: SwapStrategy,
        block_size: int,
        advances_dropped: bool,
    ) -> None:
        self.copies = CopyLedger()
        self.recomputed_tokens = 0
        """Tokens whose KV was computed, dropped, and not found again."""
        self.preemptions = 0
        self.preempted: set[Request] = set()
        """Requests that lost their KV or its place in the step that is being planned."""
        self.dropped: dict[Request, None] = {}
        """Requests that have lost their KV and not come back, in that order."""
        self.num_dropped_blocks = 0
        """Blocks that they will need again."""
        self.num_swapped_blocks = 0
        """Needed on the host by requests that have nothing on the device."""
        self._device = device
        self._host = host
        self._prefix_cache = prefix_cache
        self._queues = policy.queues
        self._strategy = strategy
        self._block_size = block_size
        self._advances_dropped = advances_dropped

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._block_size)

    @property
    def host_room(self) -> int:
        """Host blocks for the KV of more victims; copies of what is on the device give way.

        Not those that are being copied just now: who comes back has its host blocks until it has.
        """
        if self._strategy == "recompute":
            return 0
        moving: dict[Request, None] = {}
        in_use = self.num_swapped_blocks
        for copy in self.copies.outstanding:
            in_use += len(copy.host_blocks)
            if copy.request and not copy.request.kv.num_swapped_blocks:
                moving[copy.request] = None
        return self._host.capacity - in_use - sum(len(each.kv.host_table) for each in moving)

    def swap_in(
        self,
        request: Request,
        sources: Sequence[int],
        targets: Sequence[int],
        precedes_step: int | None,
        host_blocks: Sequence[int] = (),
    ) -> None:
        """Start to copy host blocks into the device blocks of a request.

        Args:
            request: resident as of now, SWAPPING_IN unless a step waits for the copy.
            sources: host blocks.
            targets: its device blocks, as many.
            precedes_step: the step that waits for the copy; None when no step takes the request
                before it is done.
            host_blocks: those of the sources that belong to the prefix cache.
        """
        self._is_swapped_no_more(request)
        copy = Copy(
            request,
            CopyDirection.SWAP_IN,
            makes_clean=min(
                len(request.kv.host_table), request.num_computed_tokens // self._block_size
            ),
            host_blocks=tuple(host_blocks),
        )
        self.copies.start(copy, sources, targets, precedes_step)

    def preempt(self, victim: Request, cause: Request | None, step_id: int) -> None:
        """Take the device blocks of a resident; they are free now, or when its copy is done.

        Args:
            victim: gives them up.
            cause: gets them; None keeps them for the arrivals expected.
            step_id: the step that is being planned.
        """
        self.preemptions += 1
        self.preempted.add(victim)
        victim.steady_until = 0
        victim.kv.preempted_for = cause.request_id if cause else None
        used = self.blocks_for(victim.num_computed_tokens)
        if self._strategy == "recompute" or not self._make_host_room(
            victim, used - self._find_copies(victim)
        ):
            self.drop(victim)
            return
        if victim.kv.block_hashes:
            self._prefix_cache.left(victim)
        clean = victim.kv.num_clean_blocks
        reactive = self._strategy == "reactive"
        moves = clean < used and not reactive
        self._queues.put(victim, RequestStatus.SWAPPING_OUT if moves else RequestStatus.SWAPPED)
        victim.kv.num_swapped_blocks = used
        self.num_swapped_blocks += used
        table, victim.kv.block_table = victim.kv.block_table, []
        self._device.free(table[:clean])
        self._device.free(table[used:])
        if clean < used:
            leaving = tuple(table[clean:used])
            self._copy_out(victim, leaving, leaving, step_id if reactive else None)

    def write_through(self, request: Request, limit: int) -> int:
        """Copy up to `limit` full blocks ahead of need; returns how many."""
        if not self._host.capacity:
            return 0
        dirty = request.num_computed_tokens // self._block_size - self._find_copies(request)
        count = min(dirty, limit, self._host.free_count)
        if count <= 0:
            return 0
        clean = request.kv.num_clean_blocks
        self._copy_out(request, request.kv.block_table[clean : clean + count], (), None)
        return count

    def evict_kept(self, limit: int) -> None:
        """Move up to `limit` contents without owners from the device to the host, oldest first."""
        sources: list[int] = []
        hashes: list[BlockHash] = []
        while len(sources) < limit and (block_hash := self._device.oldest_kept()):
            block = self._device.drop_oldest_kept()
            if block_hash in self._host or not self._host.free_count - len(sources):
                self._device.free([block])
                continue
            sources.append(block)
            hashes.append(block_hash)
        if sources:
            targets = tuple(self._host.allocate(len(sources)))
            copy = Copy(
                None,
                CopyDirection.SWAP_OUT,
                leaving=tuple(sources),
                host_blocks=targets,
                host_hashes=tuple(hashes),
            )
            self.copies.start(copy, sources, targets, None)

    def finish(self, copy: Copy) -> None:
        """All ranks have finished a copy; its request has not ended."""
        request = copy.request
        if request is None:
            return
        first, request.kv.num_clean_blocks = request.kv.num_clean_blocks, copy.makes_clean
        if copy.direction is CopyDirection.SWAP_IN:
            # The last block grows again, so its copy on the host is worth nothing.
            self._host.free(request.kv.host_table[copy.makes_clean :])
            del request.kv.host_table[copy.makes_clean :]
            if request.status is RequestStatus.SWAPPING_IN:
                request.status = RequestStatus.READY
            self._prefix_cache.publish(request)
        else:
            self._prefix_cache.publish_on_host(request, first, copy.makes_clean)
            if request.status is RequestStatus.SWAPPING_OUT:
                request.status = RequestStatus.SWAPPED

    def release(self, copy: Copy) -> None:
        """Give up what a finished copy itself owned."""
        self._device.free(copy.leaving)
        for block, block_hash in zip(copy.host_blocks, copy.host_hashes, strict=False):
            self._host.publish(block, block_hash)
        self._host.free(copy.host_blocks)

    def drop(self, request: Request) -> None:
        """Give up the KV of a request that is not copied just now; it is prefilled again."""
        request.kv.num_dropped_tokens += request.num_computed_tokens
        self.free_tables(request)
        self._queues.put(request, RequestStatus.WAITING)
        if self._advances_dropped:
            self._queues.advance(request)
        self.dropped[request] = None
        self.num_dropped_blocks += self.blocks_for(request.num_tokens)

    def is_dropped_no_more(self, request: Request) -> None:
        """Forget that a request was dropped, since it has KV again or has ended."""
        if request in self.dropped:
            del self.dropped[request]
            self.num_dropped_blocks -= self.blocks_for(request.num_tokens)

    def free_tables(self, request: Request) -> None:
        """Give up all blocks of a request that nothing uses any more."""
        self._prefix_cache.left(request)
        self._is_swapped_no_more(request)
        request.steady_until = 0
        self._device.free(request.kv.block_table)
        self._host.free(request.kv.host_table)
        request.kv.block_table = []
        request.kv.host_table = []
        request.kv.num_clean_blocks = request.kv.num_published_blocks = (
            request.num_computed_tokens
        ) = 0

    def _is_swapped_no_more(self, request: Request) -> None:
        self.num_swapped_blocks -= request.kv.num_swapped_blocks
        request.kv.num_swapped_blocks = 0

    # --- within --------------------------------------------------------------------------------

    def _find_copies(self, request: Request) -> int:
        """Clean blocks of a request, after taking those the host has by their content."""
        if not request.kv.num_copies:
            full = min(
                request.num_computed_tokens // self._block_size, len(request.kv.block_hashes)
            )
            for index in range(request.kv.num_clean_blocks, full):
                block = self._host.share(request.kv.block_hashes[index])
                if block is None:
                    break
                request.kv.host_table.append(block)
                request.kv.num_clean_blocks += 1
        return request.kv.num_clean_blocks

    def _make_host_room(self, victim: Request, count: int) -> bool:
        """Free host blocks for the victim's, if others need theirs less.

        First the copies of requests that are on the device as well, then the KV of those on the
        host that will run after the victim.
        """
        host = self._host
        if host.free_count >= count:
            return True
        if count > host.capacity:
            return False
        # Those who run first do not need theirs soon.
        for resident in islice(self._queues.walk(Place.RESIDENT), _LOOKED_AT):
            if resident is not victim and resident.kv.host_table and not resident.kv.num_copies:
                host.free(resident.kv.host_table)
                resident.kv.host_table = []
                resident.kv.num_clean_blocks = 0
                if host.free_count >= count:
                    return True
        rank = self._queues.rank(victim)
        for hosted in self._queues.iter_reversed(Place.SWAPPED):
            if host.free_count >= count or self._queues.rank(hosted) < rank:
                break
            if not hosted.kv.num_copies:
                hosted.kv.preempted_for = victim.request_id
                self.preempted.add(hosted)
                self.drop(hosted)
        return host.free_count >= count

    def _copy_out(
        self,
        request: Request,
        sources: Sequence[int],
        leaving: tuple[int, ...],
        precedes_step: int | None,
    ) -> None:
        targets = self._host.allocate(len(sources))
        request.kv.host_table.extend(targets)
        if precedes_step is not None:
            # The step waits for the copy on every rank, so its blocks can be given away now.
            self._device.free(leaving)
            leaving = ()
        clean = len(request.kv.host_table)
        copy = Copy(request, CopyDirection.SWAP_OUT, leaving=leaving, makes_clean=clean)
        self.copies.start(copy, sources, targets, precedes_step)
