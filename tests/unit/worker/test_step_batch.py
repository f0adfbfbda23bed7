from __future__ import annotations

import pytest
import torch

from fastserve_mega.types import RequestId, SamplingParams
from fastserve_mega.worker import step_batch
from fastserve_mega.worker.model_runner import SequenceInput
from fastserve_mega.worker.step_batch import NO_SLOT, PackedStep, StepShape

CPU = torch.device("cpu")


def sequence(name, tokens, start, table, samples=True):
    return SequenceInput(
        request_id=RequestId(name),
        token_ids=tokens,
        start=start,
        block_table=table,
        samples=samples,
        params=SamplingParams(),
        seed=0,
        prompt_tokens=1,
    )


def build_step(batch, block_size, device):
    return PackedStep(batch, block_size).to(device)


def test_a_mixed_batch_puts_decoding_rows_first():
    step = build_step(
        [
            sequence("prefill", [10, 11, 12], 2, [5, 6]),
            sequence("decode", [20], 6, [7, 8]),
            sequence("chunk", [30, 31], 0, [9], samples=False),
        ],
        4,
        CPU,
    )
    assert step.token_ids.tolist() == [20, 10, 11, 12, 30, 31]
    assert step.positions.tolist() == [6, 2, 3, 4, 0, 1]
    assert step.slots.tolist() == [8 * 4 + 2, 5 * 4 + 2, 5 * 4 + 3, 6 * 4, 9 * 4, 9 * 4 + 1]
    assert [group.rows for group in step.decode] == [slice(0, 1)]
    assert [(span.rows, span.start) for span in step.prefill] == [
        (slice(1, 4), 2),
        (slice(4, 6), 0),
    ]
    # In the order of the batch: the prefill's last row, then the decoding row.
    assert step.sample_rows.tolist() == [3, 0]


def test_tables_are_cut_to_the_context_and_padded_with_the_null_block():
    step = build_step([sequence("a", [1], 3, [4, 9, 9]), sequence("b", [1], 8, [5, 6, 7])], 4, CPU)
    (group,) = step.decode
    assert group.contexts.tolist() == [9, 4]
    assert group.block_tables.tolist() == [[5, 6, 7], [4, 0, 0]]


def test_long_and_short_contexts_are_not_padded_to_each_other():
    long_table = list(range(1, 101))
    step = build_step(
        [
            sequence("short", [1], 3, [200]),
            sequence("long", [1], 399, long_table),
            sequence("half", [1], 250, long_table),
        ],
        4,
        CPU,
    )
    assert [tuple(group.block_tables.shape) for group in step.decode] == [(2, 100), (1, 1)]
    assert step.sample_rows.tolist() == [2, 0, 1]


def test_fresh_blocks_are_those_begun_and_not_filled():
    step = build_step(
        [
            sequence("decode into a new block", [1], 4, [2, 3]),
            sequence("decode into an old block", [1], 5, [4, 5]),
            sequence("prefill ending inside a block", [1] * 6, 0, [6, 7]),
            sequence("prefill filling its blocks", [1] * 8, 0, [8, 9]),
            sequence("chunk inside one block", [1, 1], 1, [10]),
        ],
        4,
        CPU,
    )
    assert step.fresh_blocks.tolist() == [3, 7]


def test_a_step_of_a_fixed_size_is_filled_up_with_rows_that_change_nothing():
    batch = [sequence("a", [7], 5, [3, 4]), sequence("b", [8], 1, [2])]
    packed = PackedStep(batch, 4, StepShape.of_decodes(sequences=4, blocks=3))
    step = packed.to(CPU)
    assert step.token_ids.tolist() == [7, 8, 0, 0]
    assert step.slots.tolist() == [4 * 4 + 1, 2 * 4 + 1, NO_SLOT, NO_SLOT]
    assert step.contexts.tolist() == [6, 2, 0, 0]
    assert step.block_tables[:, :2].tolist() == [[3, 4], [2, 0], [0, 0], [0, 0]]
    assert packed.filled == len(packed.numbers) - 4  # the third blocks, which none has
    assert step.first_rows.tolist() == [0, 1, 2, 3, 4]
    assert step.fresh_blocks.tolist() == [0, 0, 0, 0]
    assert step.sample_rows.tolist() == [0, 1, 0, 0]


def test_one_copy_brings_a_step_to_the_device(monkeypatch):
    """Each copy costs a call, whatever its size."""
    copied = []
    monkeypatch.setattr(step_batch, "to_device", lambda host, device: copied.append(host) or host)
    step = build_step(
        [sequence("a", [1, 2], 0, [5]), sequence("b", [1], 40, list(range(11)))], 4, CPU
    )
    (packed,) = copied
    for part in (step.token_ids, step.block_tables, step.decode[0].contexts, step.sample_rows):
        assert part.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()


def test_a_sequence_without_tokens_or_blocks_is_refused():
    with pytest.raises(ValueError, match="request a has no token"):
        build_step([sequence("a", [], 0, [1])], 4, CPU)
    with pytest.raises(ValueError, match="request a has 5 tokens, its 1 blocks hold 4"):
        build_step([sequence("a", [1], 4, [1])], 4, CPU)
