"""Turns the sequences of a step into tensors: once per step, for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastserve_mega.worker.model_runner import SequenceInput
from fastserve_mega.worker.transfer import to_device

NO_SLOT = -1
"""Where the KV of a row goes that only fills up a step of a fixed size: nowhere."""
_SMALL_TABLE = 16
"""Blocks up to which tables are padded to each other rather than put into groups of their own:
below it a group costs more time than the padding does."""

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences with one new token each and contexts of similar length."""

    rows: slice
    """Their rows of the step."""
    block_tables: Tensor
    """[sequences, blocks], padded with the null block."""
    contexts: Tensor
    """[sequences] tokens to attend to, the new one included."""


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    """One sequence with several new tokens."""

    rows: slice
    start: int
    """Position of the first new token; 0 when nothing is in the cache yet."""
    block_table: Tensor
    """[1, blocks]"""


@dataclass(frozen=True, slots=True)
class StepShape:
    """How many of everything a step has."""

    rows: int
    sequences: int
    blocks: int
    """Blocks of the longest block table."""
    fresh_blocks: int
    samples: int

    @classmethod
    def of_decodes(cls, sequences: int, blocks: int) -> StepShape:
        """Return that of a step in which each sequence has one new token that is sampled."""
        return cls(sequences, sequences, blocks, sequences, sequences)

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many numbers each array of a step has, in the order in which they are packed.

        But for the rules, and behind them the block tables.
        """
        rows, sequences = self.rows, self.sequences
        return (rows, rows, rows, sequences, sequences + 1, self.fresh_blocks, self.samples)


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The tensors of one step, on the device. Decoding sequences come first, in groups."""

    token_ids: Tensor
    """[tokens]"""
    positions: Tensor
    """[tokens], counted from the start of each prompt."""
    slots: Tensor
    """[tokens] block * block_size + offset: where each token's KV goes, or NO_SLOT."""
    block_tables: Tensor
    """[sequences, blocks], padded with the null block; the first blocks of all lie together."""
    contexts: Tensor
    """[sequences] tokens to attend to, the new ones included."""
    first_rows: Tensor
    """[sequences + 1] the first row of each sequence, and the number of rows."""
    fresh_blocks: Tensor
    """[n] blocks that get their first token in this step and stay partly empty."""
    sample_rows: Tensor
    """[samples] rows whose logits are wanted, in the order of the batch: the first `scored` of them
    for the next token of a prompt, the others to sample."""
    decode: tuple[DecodeGroup, ...]
    prefill: tuple[PrefillSpan, ...]
    scored: int = 0

    @property
    def num_decodes(self) -> int:
        """How many sequences have one new token, those included that fill the step up."""
        return self.block_tables.shape[0] - len(self.prefill)


class PackedStep:
    """A step on the host, in one array, so that one copy brings it to the device.

    Args:
        batch: its sequences.
        block_size: tokens in a block.
        room: has at least as many of everything. Rows and sequences that fill it up have no
            context and write nothing, so that they change nothing.
        rules: numbers that go along with the step's own, in `rules`.

    Raises:
        ValueError: a sequence has no token, or a block table is too short for its tokens.
    """

    def __init__(
        self,
        batch: Sequence[SequenceInput],
        block_size: int,
        room: StepShape | None = None,
        rules: int = 0,
    ) -> None:
        for sequence in batch:
            check_sequence(sequence, block_size)
        self._groups = _decode_groups(batch, block_size)
        prefill = [index for index, sequence in enumerate(batch) if len(sequence.token_ids) > 1]
        order = [index for group in self._groups for index in group] + prefill
        self._ordered = [batch[index] for index in order]
        self._block_size = block_size
        fresh = fresh_blocks(batch, block_size)
        sampled = [index for index, sequence in enumerate(batch) if sequence.samples]
        self._scored = sum(each.scored for each in batch)
        if room is None:
            room = StepShape(
                rows=sum(len(sequence.token_ids) for sequence in batch),
                sequences=len(batch),
                blocks=max((_blocks_of(sequence, block_size) for sequence in batch), default=0),
                fresh_blocks=len(fresh),
                samples=self._scored + len(sampled),
            )
        self.shape = room
        tables = self._tables()
        self._sizes = [*room.sizes, rules, room.sequences * room.blocks]
        self.filled = sum(self._sizes) - room.sequences * (room.blocks - tables.shape[1])
        """What lies behind so many numbers is looked at by nobody: tables end with the longest."""
        self.numbers: Numbers = np.empty(sum(self._sizes), dtype=np.int64)
        self.numbers[: self.filled] = 0  # the null block, for one
        *parts, self.rules, table = np.split(self.numbers, np.cumsum(self._sizes[:-1]))
        tokens, positions, slots, contexts, first_rows, fresh_part, sample_rows = parts
        lengths = np.array([len(each.token_ids) for each in self._ordered], dtype=np.int64)
        starts = np.array([each.start for each in self._ordered], dtype=np.int64)
        count, rows = len(order), int(lengths.sum())
        first_rows[1 : count + 1] = np.cumsum(lengths)
        # Each of those that fill it up has a row of its own.
        filling = rows + np.arange(1, room.sequences - count + 1)
        first_rows[count + 1 :] = np.minimum(filling, room.rows)
        tokens[:rows] = [token for each in self._ordered for token in each.token_ids]
        positions[:rows] = np.arange(rows) + np.repeat(starts - first_rows[:count], lengths)
        contexts[:count] = starts + lengths
        table.reshape(room.blocks, room.sequences)[: tables.shape[1], :count] = tables.T
        owners = np.repeat(np.arange(count), lengths)
        at = positions[:rows]
        slots[:rows] = tables[owners, at // block_size] * block_size + at % block_size
        slots[rows:] = NO_SLOT
        fresh_part[: len(fresh)] = fresh
        last_row = np.empty(count, dtype=np.int64)
        last_row[order] = first_rows[1 : count + 1] - 1
        wanted = [*_scored_rows(batch, last_row), *last_row[sampled]]
        sample_rows[: len(wanted)] = wanted

    def _tables(self) -> Numbers:
        """Return the block tables [sequences, blocks of the longest]."""
        counts = [_blocks_of(sequence, self._block_size) for sequence in self._ordered]
        tables = np.zeros((len(counts), max(counts, default=0)), dtype=np.int64)
        for row, (sequence, count) in enumerate(zip(self._ordered, counts, strict=True)):
            tables[row, :count] = sequence.block_table[:count]
        return tables

    def to(self, device: torch.device) -> StepBatch:
        """Copy it; the copy may still be under way, in the order of the device's work."""
        return self.on(to_device(torch.from_numpy(self.numbers), device))

    def on(self, numbers: Tensor) -> StepBatch:
        """A step whose tensors are parts of `numbers`, the array on the device."""
        tokens, positions, slots, contexts, first_rows, fresh, sample_rows, _, table = torch.split(
            numbers, self._sizes
        )
        tables = table.view(self.shape.blocks, self.shape.sequences).t()
        decode, prefill, row = [], [], 0
        for group in self._groups:
            rows = slice(row, row + len(group))
            blocks = _blocks_of(self._ordered[row], self._block_size)  # the longest of its group
            decode.append(DecodeGroup(rows, tables[rows, :blocks], contexts[rows]))
            row = rows.stop
        for index in range(row, len(self._ordered)):
            sequence = self._ordered[index]
            rows = slice(row, row + len(sequence.token_ids))
            blocks = _blocks_of(sequence, self._block_size)
            prefill.append(PrefillSpan(rows, sequence.start, tables[index : index + 1, :blocks]))
            row = rows.stop
        return StepBatch(
            tokens,
            positions,
            slots,
            tables,
            contexts,
            first_rows,
            fresh,
            sample_rows,
            tuple(decode),
            tuple(prefill),
            self._scored,
        )


def _scored_rows(batch: Sequence[SequenceInput], last_row: Numbers) -> list[int]:
    rows: list[int] = []
    for sequence, last in zip(batch, last_row.tolist(), strict=True):
        first = last + 1 - len(sequence.token_ids)
        rows.extend(range(first, first + sequence.scored))
    return rows


def check_sequence(sequence: SequenceInput, block_size: int) -> None:
    """See that a sequence has tokens, and blocks for them.

    Raises:
        ValueError: it has not.
    """
    if not sequence.token_ids:
        raise ValueError(f"request {sequence.request_id} has no token in this step")
    room = len(sequence.block_table) * block_size
    if sequence.context > room:
        raise ValueError(
            f"request {sequence.request_id} has {sequence.context} tokens, its "
            f"{len(sequence.block_table)} blocks hold {room}"
        )


def _blocks_of(sequence: SequenceInput, block_size: int) -> int:
    return -(-sequence.context // block_size)


def _decode_groups(batch: Sequence[SequenceInput], block_size: int) -> list[list[int]]:
    """Group by context length, so that padding at most doubles what attention reads."""
    lengths = [
        (_blocks_of(sequence, block_size), index)
        for index, sequence in enumerate(batch)
        if len(sequence.token_ids) == 1
    ]
    groups: list[list[int]] = []
    longest = 0
    for blocks, index in sorted(lengths, reverse=True):
        if not groups or (longest > _SMALL_TABLE and 2 * blocks < longest):
            groups.append([])
            longest = blocks
        groups[-1].append(index)
    return groups


def fresh_blocks(batch: Sequence[SequenceInput], block_size: int) -> list[int]:
    """Blocks whose first slot is written now and whose last is not.

    Only the last block of a sequence can be one; a block filled in this step has nothing left of
    its last owner.
    """
    fresh = []
    for sequence in batch:
        index, filled = divmod(sequence.context, block_size)
        if filled and sequence.start <= index * block_size:
            fresh.append(sequence.block_table[index])
    return fresh
