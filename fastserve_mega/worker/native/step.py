"""Lays out the sequences of a step in arrays for the C++ library."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastserve_mega.worker.model_runner import SequenceInput
from fastserve_mega.worker.native.library import StepInput
from fastserve_mega.worker.step_batch import check_sequence

_ARRAYS = (
    "token_ids",
    "positions",
    "slots",
    "first_row",
    "rows",
    "start",
    "table_at",
    "tables",
    "sample_rows",
)


class StepArrays:
    """A step in the order of its batch; keeps what its `input` points to.

    Args:
        batch: at least one sequence.
        block_size: tokens in a block.
        vocab_size: token ids are below.
        num_blocks: block ids are below.

    Raises:
        ValueError: a sequence without tokens, with too few blocks, or with a number out of range.
    """

    def __init__(
        self,
        batch: Sequence[SequenceInput],
        *,
        block_size: int,
        vocab_size: int,
        num_blocks: int,
    ) -> None:
        lists: dict[str, list[int]] = {name: [] for name in _ARRAYS}
        for sequence in batch:
            check_sequence(sequence, block_size)
            _append(lists, sequence, block_size)
        _check_range("token id", lists["token_ids"], vocab_size)
        _check_range("block", lists["tables"], num_blocks)
        self.tokens = len(lists["token_ids"])
        scored = [
            first + row
            for first, sequence in zip(lists["first_row"], batch, strict=True)
            for row in range(sequence.scored)
        ]
        self.scored = len(scored)
        """So many of the rows whose logits are computed, the first ones, tell of prompts."""
        lists["sample_rows"] = scored + lists["sample_rows"]
        self.samples = len(lists["sample_rows"])
        self._numbers = np.array([n for name in _ARRAYS for n in lists[name]], dtype=np.int32)
        self.input = StepInput(
            tokens=self.tokens,
            sequences=len(batch),
            samples=self.samples,
            max_context=max(sequence.context for sequence in batch),
        )
        at = self._numbers.ctypes.data
        for name in _ARRAYS:
            setattr(self.input, name, at)
            at += self._numbers.itemsize * len(lists[name])


def _append(lists: dict[str, list[int]], sequence: SequenceInput, block_size: int) -> None:
    context, table = sequence.context, sequence.block_table
    lists["first_row"].append(len(lists["token_ids"]))
    lists["rows"].append(len(sequence.token_ids))
    lists["start"].append(sequence.start)
    lists["table_at"].append(len(lists["tables"]))
    lists["tables"].extend(table[: -(-context // block_size)])
    lists["token_ids"].extend(sequence.token_ids)
    positions = range(sequence.start, context)
    lists["positions"].extend(positions)
    lists["slots"].extend([table[p // block_size] * block_size + p % block_size for p in positions])
    if sequence.samples:
        lists["sample_rows"].append(len(lists["token_ids"]) - 1)


def _check_range(name: str, numbers: list[int], limit: int) -> None:
    """Beyond it, the library would read and write memory that is not its own."""
    low, high = min(numbers), max(numbers)
    if low < 0 or high >= limit:
        wrong = low if low < 0 else high
        raise ValueError(f"{name} {wrong} is not between 0 and {limit - 1}")
