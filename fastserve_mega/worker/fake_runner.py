"""A runner without a model, for tests of everything around it."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from fastserve_mega.worker.runner import SequenceInput


class FakeModelRunner:
    """Generates tokens that depend on the whole context *as read back through the block table*.

    Its KV pool holds token ids. So a block that is given to two requests, freed too early, or
    missing from a table changes the tokens, as it would with a model.
    """

    def __init__(self, *, device_blocks: int, block_size: int, vocab_size: int) -> None:
        self._pool = [[-1] * block_size for _ in range(device_blocks)]
        self._block_size = block_size
        self._vocab_size = vocab_size
        self.steps = 0

    @property
    def device_blocks(self) -> int:
        return len(self._pool)

    @property
    def is_sampling_rank(self) -> bool:
        return True

    def execute(self, batch: Sequence[SequenceInput]) -> list[int]:
        self.steps += 1
        for sequence in batch:
            for position, token in enumerate(sequence.token_ids, sequence.start):
                block = sequence.block_table[position // self._block_size]
                self._pool[block][position % self._block_size] = token
        return [
            fake_token(self._read(sequence), self._vocab_size)
            for sequence in batch
            if sequence.samples
        ]

    def close(self) -> None:
        pass

    def _read(self, sequence: SequenceInput) -> list[int]:
        size = self._block_size
        return [
            self._pool[sequence.block_table[position // size]][position % size]
            for position in range(sequence.context)
        ]


def fake_token(context: Sequence[int], vocab_size: int) -> int:
    """The token that follows a context; never 0, which tests use as end of sequence."""
    return 1 + zlib.crc32(repr(list(context)).encode()) % (vocab_size - 1)
