"""Turns the sequences of a step into tensors: once per step, for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastserve_mega.worker.kv_cache import NULL_BLOCK
from fastserve_mega.worker.model_runner import SequenceInput

_SMALL_TABLE = 16
"""Blocks up to which tables are padded to each other rather than put into groups of their own:
below it a group costs more time than the padding does."""


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
class StepBatch:
    """The tensors of one step, on the device. Decoding sequences come first, in groups."""

    token_ids: Tensor
    """[tokens]"""
    positions: Tensor
    """[tokens], counted from the start of each prompt."""
    slots: Tensor
    """[tokens] block * block_size + offset: where each token's KV goes."""
    fresh_blocks: Tensor
    """[n] blocks that get their first token in this step and stay partly empty."""
    decode: tuple[DecodeGroup, ...]
    prefill: tuple[PrefillSpan, ...]
    sample_rows: Tensor
    """[samples] rows whose logits are sampled, in the order of the batch."""


def build_step(batch: Sequence[SequenceInput], block_size: int, device: torch.device) -> StepBatch:
    """Lay out a batch.

    Raises:
        ValueError: a sequence has no token, or a block table is too short for its tokens.
    """
    for sequence in batch:
        check_sequence(sequence, block_size)
    groups = _decode_groups(batch, block_size)
    prefill = [index for index, sequence in enumerate(batch) if len(sequence.token_ids) > 1]
    order = [index for group in groups for index in group] + prefill
    ordered = [batch[index] for index in order]
    first_rows = _first_rows(ordered)
    last_row = {
        index: first + len(sequence.token_ids) - 1
        for index, first, sequence in zip(order, first_rows, ordered, strict=True)
    }
    positions = [p for sequence in ordered for p in range(sequence.start, sequence.context)]
    slots = [
        sequence.block_table[p // block_size] * block_size + p % block_size
        for sequence in ordered
        for p in range(sequence.start, sequence.context)
    ]

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long).to(device, non_blocking=True)

    first_of = dict(zip(order, first_rows, strict=True))
    return StepBatch(
        token_ids=tensor([token for sequence in ordered for token in sequence.token_ids]),
        positions=tensor(positions),
        slots=tensor(slots),
        fresh_blocks=tensor(fresh_blocks(batch, block_size)),
        decode=tuple(
            _decode_group([batch[i] for i in group], first_of[group[0]], block_size, device)
            for group in groups
        ),
        prefill=tuple(
            _prefill_span(batch[index], first_of[index], block_size, device) for index in prefill
        ),
        sample_rows=tensor([last_row[i] for i, sequence in enumerate(batch) if sequence.samples]),
    )


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


def _blocks_for(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def _first_rows(ordered: Sequence[SequenceInput]) -> list[int]:
    rows, row = [], 0
    for sequence in ordered:
        rows.append(row)
        row += len(sequence.token_ids)
    return rows


def _decode_groups(batch: Sequence[SequenceInput], block_size: int) -> list[list[int]]:
    """Group by context length, so that padding at most doubles what attention reads."""
    lengths = [
        (_blocks_for(sequence.context, block_size), index)
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


def _decode_group(
    sequences: list[SequenceInput], first_row: int, block_size: int, device: torch.device
) -> DecodeGroup:
    contexts = [sequence.context for sequence in sequences]
    width = _blocks_for(max(contexts), block_size)
    tables = []
    for sequence in sequences:
        blocks = list(sequence.block_table[: _blocks_for(sequence.context, block_size)])
        tables.append(blocks + [NULL_BLOCK] * (width - len(blocks)))
    return DecodeGroup(
        rows=slice(first_row, first_row + len(sequences)),
        block_tables=torch.tensor(tables).to(device, non_blocking=True),
        contexts=torch.tensor(contexts).to(device, non_blocking=True),
    )


def _prefill_span(
    sequence: SequenceInput, first_row: int, block_size: int, device: torch.device
) -> PrefillSpan:
    blocks = list(sequence.block_table[: _blocks_for(sequence.context, block_size)])
    return PrefillSpan(
        rows=slice(first_row, first_row + len(sequence.token_ids)),
        start=sequence.start,
        block_table=torch.tensor([blocks]).to(device, non_blocking=True),
    )


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
