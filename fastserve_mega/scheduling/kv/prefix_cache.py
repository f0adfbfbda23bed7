"""Finds KV that exists already: full blocks by the hash of their content."""

from __future__ import annotations

from collections.abc import Sequence

from fastserve_mega.scheduling.kv.pool import BlockPool
from fastserve_mega.scheduling.request import Request
from fastserve_mega.types import BlockHash


class PrefixCache:
    """Blocks of both pools by content; what is kept without owners counts as free memory.

    A prefix that many requests have in common is prefilled once: whoever needs a block that is
    being computed just now waits for that step.
    """

    def __init__(self, device: BlockPool, host: BlockPool, block_size: int) -> None:
        self._device = device
        self._host = host
        self._block_size = block_size
        self._computing: dict[BlockHash, Request] = {}
        """Requests that were admitted to compute a block, until it is published or dropped."""
        self.queried_tokens = 0
        """Tokens of admitted requests."""
        self.hit_tokens = 0
        """The part of them whose KV was found."""

    def known_tokens(self, request: Request) -> int:
        """How many leading tokens of a request would be found now."""
        return self.tokens_of(request.kv.block_hashes[: self._usable(request)])

    def tokens_of(self, block_hashes: Sequence[BlockHash]) -> int:
        """How many tokens the leading blocks hold that would be found now, nearly always.

        Where each block is looked for only if the one before it was found, this bisects instead:
        both pools forget the last blocks of a prompt first (`BlockPool.free`).
        """
        found, missing = 0, len(block_hashes)
        middle = 0  # most prompts are not known at all
        while found < missing:
            block_hash = block_hashes[middle]
            if block_hash in self._device or block_hash in self._host:
                found = middle + 1
            else:
                missing = middle
            middle = (found + missing) // 2
        return found * self._block_size

    def find(self, request: Request) -> tuple[list[int | None], list[int]]:
        """Make a request an owner of the leading blocks that exist.

        Returns:
            Device blocks, None where the KV has to be copied from the host; and the host blocks to
            copy from, in order.
        """
        table: list[int | None] = []
        host_blocks: list[int] = []
        for block_hash in request.kv.block_hashes[: self._usable(request)]:
            block = self._device.share(block_hash)
            if block is None:
                host_block = self._host.share(block_hash)
                if host_block is None:
                    break
                host_blocks.append(host_block)
            table.append(block)
        return table, host_blocks

    def give_up(self, table: Sequence[int | None], host_blocks: Sequence[int]) -> None:
        """Give back what `find` has found."""
        self._device.free([block for block in table if block is not None])
        self._host.free(host_blocks)

    def is_being_computed(self, request: Request, blocks: int) -> bool:
        """Whether a step that is under way computes the block after the first `blocks`."""
        if blocks >= self._usable(request):
            return False
        other = self._computing.get(request.kv.block_hashes[blocks])
        if other is None or not other.num_scheduled_tokens:
            return False
        end = other.num_computed_tokens + other.num_scheduled_tokens
        return other.num_computed_tokens < (blocks + 1) * self._block_size <= end

    def admitted(self, request: Request, found: int) -> None:
        """Take in that a request computes what is behind the leading blocks that were found."""
        for block_hash in request.kv.block_hashes[found:]:
            self._computing.setdefault(block_hash, request)
        self.queried_tokens += request.num_tokens
        self.hit_tokens += found * self._block_size
        request.kv.num_published_blocks = found

    def publish(self, request: Request) -> None:
        """Let others find the full device blocks that it has computed since the last call."""
        full = min(request.num_computed_tokens // self._block_size, len(request.kv.block_hashes))
        for index in range(request.kv.num_published_blocks, full):
            block_hash = request.kv.block_hashes[index]
            self._device.publish(request.kv.block_table[index], block_hash)
            self._computing.pop(block_hash, None)
        request.kv.num_published_blocks = max(full, request.kv.num_published_blocks)

    def publish_on_host(self, request: Request, first: int, last: int) -> None:
        """Let others find clean blocks [first, last) on the host."""
        full = min(
            request.num_computed_tokens // self._block_size, len(request.kv.block_hashes), last
        )
        for index in range(first, full):
            self._host.publish(request.kv.host_table[index], request.kv.block_hashes[index])

    def left(self, request: Request) -> None:
        """It is no longer resident, and computes nothing."""
        for block_hash in request.kv.block_hashes[request.kv.num_published_blocks :]:
            if self._computing.get(block_hash) is request:
                del self._computing[block_hash]

    def forget(self) -> None:
        """All memory was lost."""
        self._computing.clear()
        self._device.forget_contents()
        self._host.forget_contents()

    def _usable(self, request: Request) -> int:
        """Full blocks that leave at least one token to compute."""
        return (request.num_tokens - 1) // self._block_size
