from __future__ import annotations

import dataclasses

import pytest

from fastserve_mega.models.architecture import Architecture, Rope
from fastserve_mega.models.llama import WEIGHTS
from fastserve_mega.system.config import ParallelConfig
from fastserve_mega.system.partition import partition_model, split_layers

MODEL = Architecture(
    name="LlamaForCausalLM",
    num_layers=7,
    hidden_size=64,
    num_heads=8,
    num_kv_heads=2,
    head_dim=8,
    ffn_hidden_size=96,
    vocab_size=101,
    max_context=256,
    norm="rms",
    norm_epsilon=1e-5,
    activation="silu",
    gated=True,
    positions=Rope(theta=10000.0),
    tied_embeddings=True,
    weights=WEIGHTS,
)


def test_layers_are_split_evenly_with_the_extra_ones_first():
    stages = split_layers(7, ParallelConfig(pipeline=3))
    assert stages == (range(3), range(3, 5), range(5, 7))


def test_layers_per_stage_is_followed():
    parallel = ParallelConfig(pipeline=2, layers_per_stage=(1, 6))
    assert split_layers(7, parallel) == (range(1), range(1, 7))


def test_ranks_are_numbered_stage_by_stage():
    parallel = ParallelConfig(tensor=2, pipeline=2)
    parts = [partition_model(MODEL, parallel, rank, 4) for rank in range(4)]
    assert [(part.stage, part.tensor_rank) for part in parts] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [part.is_last_stage for part in parts] == [False, False, True, True]


def test_heads_and_vocabulary_are_divided_with_padding():
    parallel = ParallelConfig(tensor=2)
    part = partition_model(MODEL, parallel, 1, 2)
    assert part.query_heads == range(4, 8)
    assert part.kv_heads == range(1, 2)
    assert part.padded_vocab_size == 102
    assert part.vocab_rows == range(51, 102)
    assert part.ffn_columns == range(48, 96)


def test_key_value_heads_are_replicated_when_there_are_too_few():
    parallel = ParallelConfig(tensor=4)
    parts = [partition_model(MODEL, parallel, rank, 4) for rank in range(4)]
    assert [part.kv_heads.start for part in parts] == [0, 0, 1, 1]
    assert all(len(part.kv_heads) == 1 for part in parts)


@pytest.mark.parametrize(
    ("parallel", "world_size", "message"),
    [
        (ParallelConfig(tensor=2), 1, "1 ranks were started, .*needs 2"),
        (ParallelConfig(tensor=2, expert=2), 2, "expert=2, but LlamaForCausalLM has no experts"),
        (ParallelConfig(tensor=3), 3, "8 attention heads cannot be divided among .*=3 ranks"),
        (ParallelConfig(pipeline=8), 8, "pipeline=8 stages are too many for a model of 7 layers"),
        (
            ParallelConfig(pipeline=2, layers_per_stage=(3, 3)),
            2,
            r"layers_per_stage=\[3, 3\] adds up to 6 layers, the model has 7",
        ),
    ],
)
def test_impossible_splits_are_refused(parallel, world_size, message):
    with pytest.raises(ValueError, match=message):
        partition_model(MODEL, parallel, 0, world_size)


def test_heads_that_neither_divide_nor_replicate_are_refused():
    model = dataclasses.replace(MODEL, num_heads=12, num_kv_heads=6, ffn_hidden_size=96)
    with pytest.raises(ValueError, match="6 key-value heads can neither be divided"):
        partition_model(model, ParallelConfig(tensor=4), 0, 4)
