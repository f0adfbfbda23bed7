"""Pools of KV block ids, and what is found in them. The same id is the same block on every rank."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from fastserve_mega.records import Record
from fastserve_mega.scheduling.request import Request
from fastserve_mega.types import BlockHash

NULL_BLOCK = 0
"""Never owned and never written; it pads block tables."""


class PoolSizes(Record, frozen=True):
    """Blocks of the pools of every rank, the null blocks included."""

    device_blocks: int
    host_blocks: int
    block_size: int
    """Tokens of a block."""
    grows_ahead: bool = False
    """Whether a request gets the block of its next token a step early where many are free, so that
    its rank can go on before the next plan."""


class BlockPool:
    """The blocks of one memory: each is free, or has owners, or is kept for its content.

    A block whose content has a hash can get several owners, who only read it. When the last one
    frees it, it stays findable until its memory is needed, the least recently used first; so it
    counts as free.
    """

    def __init__(self, num_blocks: int) -> None:
        """Make a pool of the ids 1 .. num_blocks - 1, all free; of 0 or 1 blocks, an empty one."""
        if num_blocks < 0:
            raise ValueError(f"a pool cannot have {num_blocks} blocks")
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, NULL_BLOCK, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()
        """Without owners, findable; the least recently used first."""
        self._more_owners: dict[int, int] = {}
        """Owners besides the first, of those that have more."""
        self._hash_of: dict[int, BlockHash] = {}
        self._block_of: dict[BlockHash, int] = {}

    @property
    def capacity(self) -> int:
        """Blocks that can be owned."""
        return max(self.num_blocks - 1, 0)

    @property
    def free_count(self) -> int:
        """Blocks that can be allocated, those kept for their content included."""
        return len(self._free) + len(self._kept)

    @property
    def empty_count(self) -> int:
        """Blocks that can be allocated without losing anything."""
        return len(self._free)

    @property
    def kept_count(self) -> int:
        """Blocks without owners that are kept for their content."""
        return len(self._kept)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, the most recently freed first, kept ones last.

        Raises:
            MemoryError: fewer are free; the pool is unchanged.
        """
        if count == 1 and self._free:  # what most decodes ask for
            return [self._free.pop()]
        if count > self.free_count:
            raise MemoryError(f"{count} blocks asked for, {self.free_count} are free")
        kept = max(len(self._free) - count, 0)
        taken = self._free[kept:]
        del self._free[kept:]
        while len(taken) < count:
            taken.append(self.drop_oldest_kept())
        return taken

    def free(self, block_ids: Sequence[int]) -> None:
        """Give up one owner of each; the last blocks of a table are the first to be reused."""
        if not self._hash_of and not self._more_owners:
            self._free.extend(block_ids)
            return
        for block in reversed(block_ids):
            if block in self._more_owners:
                self._disown(block)
            elif block in self._hash_of:
                self._kept[block] = None
            else:
                self._free.append(block)

    def exclusive(self, block_ids: Sequence[int]) -> int:
        """How many of these come free when their owner frees them."""
        if not self._more_owners:
            return len(block_ids)
        return sum(block not in self._more_owners for block in block_ids)

    # --- content -------------------------------------------------------------------------------

    def publish(self, block: int, block_hash: BlockHash) -> None:
        """Make an owned block findable; does nothing when another one has the same content."""
        if block_hash not in self._block_of and block not in self._hash_of:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash

    def __contains__(self, block_hash: BlockHash) -> bool:
        return block_hash in self._block_of

    def share(self, block_hash: BlockHash) -> int | None:
        """Become an owner of the block with this content; None when there is none."""
        block = self._block_of.get(block_hash)
        if block is None:
            return None
        if block in self._kept:
            del self._kept[block]
        else:
            self._more_owners[block] = self._more_owners.get(block, 0) + 1
        return block

    def oldest_kept(self) -> BlockHash | None:
        """The content that is dropped next."""
        return self._hash_of[next(iter(self._kept))] if self._kept else None

    def drop_oldest_kept(self) -> int:
        """Forget a content; its block has an owner now."""
        block, _ = self._kept.popitem(last=False)
        del self._block_of[self._hash_of.pop(block)]
        return block

    def forget_contents(self) -> None:
        """The memory was lost; owners stay."""
        self._free.extend(self._kept)
        self._kept.clear()
        self._hash_of.clear()
        self._block_of.clear()

    def _disown(self, block: int) -> None:
        self._more_owners[block] -= 1
        if not self._more_owners[block]:
            del self._more_owners[block]

    # --- looking -------------------------------------------------------------------------------

    def check_integrity(self, owned: Iterable[int]) -> None:
        """Raise RuntimeError unless each block is free, kept, or owned as often as `owned` says."""
        owners = Counter(owned)
        if sorted([*self._free, *self._kept, *owners]) != list(range(1, self.num_blocks)):
            raise RuntimeError("free, kept and owned blocks do not partition the pool")
        if {block: count - 1 for block, count in owners.items() if count > 1} != self._more_owners:
            raise RuntimeError("the owners of shared blocks are miscounted")
        if {block_hash: block for block, block_hash in self._hash_of.items()} != self._block_of:
            raise RuntimeError("contents and blocks do not match")
        if not set(self._kept) <= set(self._hash_of):
            raise RuntimeError("a block is kept without content")


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
