"""Moves KV before it is needed: who leaves the device, who comes back, what is copied ahead."""

from __future__ import annotations

import math

from fastserve_mega.scheduling.kv.manager import KvManager
from fastserve_mega.scheduling.policies.policy import Policy
from fastserve_mega.scheduling.request import Place
from fastserve_mega.system.config import SwapConfig

_DEMAND_WINDOW_S = 10.0
"""The arrival rate is an exponential average over about this long."""
_MAX_RESERVE = 0.25
"""Share of the device pool that is kept for arrivals at most."""
_EMPTY_SHARE = 0.1
"""Below this share of empty device blocks, the oldest of the prefix cache moves to the host."""
_MAX_SWAP_INS = 8
"""Requests looked at in one step, whether they should come back."""
_LOOKS_SKIPPED = 3
"""Steps without a look for blocks to write through, after one that found none."""
_LEAD = 2.0
"""A request is brought back this many swap times before it is estimated to run."""
_COPIES_PER_TURN = 8
"""Time a request runs before others are exchanged for it, in times of one copy of its KV: what
leaves and comes back takes at most a fifth of the time."""


class SwapPlanner:
    """Proactive swapping (paper section 4.2), in the order of ENST.

    After the batch of a step is decided: those who run next come back from the host; enough
    blocks are kept free for the arrivals expected during one swap; and while nothing is being
    copied out, full blocks of those who will run last are written through, so that preempting
    them later costs at most their last block.
    """

    def __init__(self, config: SwapConfig, memory: KvManager, policy: Policy) -> None:
        self._config = config
        self._memory = memory
        self._policy = policy
        self._queues = policy.queues
        self._demand_blocks_per_s = 0.0
        self._last_arrival: float | None = None
        self._looks_to_skip = 0

    def observe_arrival(self, blocks: int, now: float) -> None:
        """A request arrived whose prompt fills this many blocks."""
        elapsed_s = math.inf if self._last_arrival is None else now - self._last_arrival
        self._last_arrival = now
        self._demand_blocks_per_s *= math.exp(-elapsed_s / _DEMAND_WINDOW_S)
        self._demand_blocks_per_s += blocks / _DEMAND_WINDOW_S

    def make_way(self, now: float, places: int) -> None:
        """Preempt for the soonest on the host when a step would take all residents.

        After such a batch nobody is left to preempt, and who is on the host would wait until an
        answer ends. A preemption has to pay for its copies: a victim has run for a multiple of the
        time in which its own KV leaves and comes back.

        Args:
            now: seconds.
            places: requests that the next step takes at most.
        """
        queues, memory = self._queues, self._memory
        if not self._policy.makes_way or not queues.count(Place.SWAPPED):
            return
        if queues.count(Place.RESIDENT) > places:
            return
        for request in self._policy.soonest_swapped(now, 1):
            if not request.kv.num_copies and self._policy.enst(now)(request) <= 0:
                turn_s = _COPIES_PER_TURN * self._memory.copies.block_s
                memory.reclaimer.exchange(request, memory.blocks_for(request.num_tokens), turn_s)

    def plan(self, now: float) -> None:
        """Decide the copies that go with this step."""
        reserve = self._reserve()
        self._memory.hold_blocks_for(())
        if self._queues.count(Place.SWAPPED):
            self._bring_back(now, reserve)
        if self._memory.device.free_count + self._memory.copies.leaving_blocks < reserve:
            self._memory.reclaimer.swap_out_for(reserve)
        if self._config.write_through_blocks:
            self._write_through()

    def _reserve(self) -> int:
        """Blocks that the arrivals of one swap time will ask for."""
        capacity = self._memory.device.capacity
        # One swap moves about what one request holds.
        swap_s = self._memory.copies.block_s * capacity / max(self._queues.count(Place.RESIDENT), 1)
        return min(int(self._demand_blocks_per_s * swap_s), int(capacity * _MAX_RESERVE))

    def _bring_back(self, now: float, reserve: int) -> None:
        memory = self._memory
        if not self._queues.count(Place.RESIDENT):
            reserve = 0  # nothing else runs, and nothing else would make room
        soonest = self._policy.soonest_swapped(now, _MAX_SWAP_INS)
        for request in soonest:
            # Some have not quite left; one may be dropped meanwhile, to make room on the host.
            if request.kv.num_copies or request.place is not Place.SWAPPED:
                continue
            blocks = memory.blocks_for(request.num_tokens)
            lead_s = _LEAD * blocks * self._memory.copies.block_s
            fits = blocks + reserve <= memory.device.free_count
            if not fits and self._policy.enst(now)(request) > lead_s:
                break
            if not memory.bring_back(request, reserve if fits else 0, None):
                break
        # Else who was dropped would come in before them, and be dropped for them again.
        memory.hold_blocks_for(soonest)

    def _write_through(self) -> None:
        memory = self._memory
        occupied = memory.device.capacity - memory.device.free_count
        if memory.copies.copying_out or (
            occupied < self._config.write_through_occupancy * memory.device.capacity
        ):
            return
        if self._looks_to_skip:
            self._looks_to_skip -= 1
            return
        left = self._config.write_through_blocks
        if memory.device.empty_count < _EMPTY_SHARE * memory.device.capacity:
            memory.swapper.evict_kept(left)
        for request in memory.reclaimer.victims:
            left -= memory.swapper.write_through(request, left)
            if left <= 0:
                return
        if left == self._config.write_through_blocks:
            self._looks_to_skip = _LOOKS_SKIPPED
