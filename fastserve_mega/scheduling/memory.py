"""Which requests hold KV blocks: admission, growth and preemption of the lowest priority."""

from __future__ import annotations

from fastserve_mega.scheduling.kv_blocks import BlockPool
from fastserve_mega.scheduling.policy import Policy
from fastserve_mega.scheduling.request import Request


class KvMemory:
    """Gives blocks to requests, and takes them from those of lower priority when none are free.

    A request is admitted with the blocks of all its known tokens at once and keeps them at least
    until it has yielded a token. So each admission makes progress, and two requests in the middle
    of their prefills can never wait for each other's blocks.

    A preempted request loses its KV and is prefilled again later (recompute).
    """

    def __init__(self, num_blocks: int, block_size: int, policy: Policy) -> None:
        self.pool = BlockPool(num_blocks)
        self.recomputed_tokens = 0
        """Tokens whose KV was computed, lost to preemption, and must be computed again."""
        self.preemptions = 0
        self._block_size = block_size
        self._policy = policy
        self._residents: dict[Request, None] = {}

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._block_size)

    def admit(self, request: Request, reserve: int) -> list[int] | None:
        """Make a request resident; `reserve` blocks stay free for the growth of those running.

        Returns:
            Its whole block table, or None when there is no memory for it in this step.
        """
        table = self._take(request, self.blocks_for(request.known_tokens), reserve)
        if table is not None:
            request.block_table = table
            request.sampled_since_admission = False
            self._residents[request] = None
            return list(table)
        return None

    def grow(self, request: Request, tokens: int) -> list[int] | None:
        """Let a resident request hold `tokens` tokens.

        Returns:
            The blocks added to its table, maybe none; None when there is no memory in this step.
        """
        missing = self.blocks_for(tokens) - len(request.block_table)
        if missing <= 0:
            return []
        added = self._take(request, missing, 0)
        if added is not None:
            request.block_table.extend(added)
        return added

    def release(self, request: Request) -> None:
        """Take all blocks of a request, which must not be in flight."""
        if request.block_table:
            self.pool.free(request.block_table)
            request.block_table = []
            request.computed_tokens = 0
            del self._residents[request]

    def lose_everything(self) -> None:
        """The ranks restarted with empty pools."""
        for request in list(self._residents):
            self.recomputed_tokens += request.computed_tokens
            self.release(request)

    def residents_by_priority(self) -> list[Request]:
        """Requests that hold blocks and are not in flight."""
        residents = [r for r in self._residents if not r.in_flight_tokens]
        residents.sort(key=self._policy.rank)
        return residents

    def check_integrity(self) -> None:
        """Raise RuntimeError unless each block is free or in exactly one block table."""
        owned = [block for request in self._residents for block in request.block_table]
        self.pool.check_integrity(owned)

    def _take(self, request: Request, count: int, reserve: int) -> list[int] | None:
        shortage = count + reserve - self.pool.free_count
        if shortage > 0 and not self._preempt_below(request, shortage):
            return None
        return self.pool.allocate(count)

    def _preempt_below(self, request: Request, shortage: int) -> bool:
        """Free at least `shortage` blocks of requests of lower priority, or none at all."""
        own_rank = self._policy.rank(request)
        victims = []
        for victim in self._lowest_first():
            if self._policy.rank(victim) <= own_rank:
                break
            victims.append(victim)
            shortage -= len(victim.block_table)
            if shortage <= 0:
                for chosen in victims:
                    self._preempt(chosen)
                return True
        return False

    def _lowest_first(self) -> list[Request]:
        """Requests that may lose their blocks in this step, the lowest priority first."""
        evictable = [
            resident
            for resident in self._residents
            if resident.sampled_since_admission and not resident.in_flight_tokens
        ]
        evictable.sort(key=self._policy.rank, reverse=True)
        return evictable

    def _preempt(self, victim: Request) -> None:
        self.preemptions += 1
        self.recomputed_tokens += victim.computed_tokens
        self.release(victim)
