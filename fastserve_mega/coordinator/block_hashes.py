"""Names of KV blocks by their content, for the prefix cache: the scheduler sees no tokens."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from fastserve_mega.types import BlockHash

_DIGEST_BYTES = 16
"""128 bits: no two contents with the same hash are ever found."""


class BlockHashChain:
    """Hashes the tokens of one request block by block, each with the hash of the one before.

    So equal hashes mean equal tokens from the start of the prompt on, and the same salt.
    """

    def __init__(self, block_size: int, salt: str) -> None:
        """Start before the first token.

        Args:
            block_size: tokens of a block.
            salt: requests with different salts share nothing.
        """
        self._block_size = block_size
        self._digest = blake2b(salt.encode(), digest_size=_DIGEST_BYTES).digest()
        self._partial: list[int] = []

    def extend(self, tokens: Sequence[int]) -> tuple[BlockHash, ...]:
        """Append tokens (0 to 2**32 - 1); returns the hashes of the blocks that they fill."""
        pending = [*self._partial, *tokens]
        full = len(pending) - len(pending) % self._block_size
        hashes = []
        for start in range(0, full, self._block_size):
            block = array("I", pending[start : start + self._block_size]).tobytes()
            self._digest = blake2b(self._digest + block, digest_size=_DIGEST_BYTES).digest()
            hashes.append(BlockHash(self._digest.hex()))
        self._partial = pending[full:]
        return tuple(hashes)
