"""Routing, and which experts and columns a rank holds."""

from __future__ import annotations

import pytest
import torch

from fastserve_mega.models.architecture import Architecture, Experts, Rope
from fastserve_mega.models.llama import WEIGHTS
from fastserve_mega.system.config import ParallelConfig
from fastserve_mega.system.partition import partition_model
from fastserve_mega.worker.megatron.experts import route

SIZES = {"count": 4, "chosen": 2, "ffn_hidden_size": 24}
LOGITS = torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, 4.0, 4.5, -1.0]])


def mixture(**changes):
    return Architecture(
        name="MixtralForCausalLM", num_layers=2, hidden_size=64, num_heads=8, num_kv_heads=4,
        head_dim=8, ffn_hidden_size=33, vocab_size=100, max_context=256, norm="rms",
        norm_epsilon=1e-5, activation="silu", gated=True, positions=Rope(theta=10000.0),
        tied_embeddings=True, weights=WEIGHTS, experts=Experts(normalized=True, **SIZES, **changes),
    )  # fmt: skip


def test_the_best_experts_are_weighed_by_the_softmax_over_all():
    weights, chosen = route(LOGITS, Experts(normalized=False, **SIZES))
    assert chosen.tolist() == [[1, 3], [0, 2]]
    everything = LOGITS.softmax(dim=-1)
    torch.testing.assert_close(weights, everything.gather(1, chosen))
    normalized, _ = route(LOGITS.bfloat16(), Experts(normalized=True, **SIZES))
    assert normalized.dtype == torch.float32
    torch.testing.assert_close(normalized.sum(dim=-1), torch.ones(2))
    torch.testing.assert_close(normalized, LOGITS.gather(1, chosen).softmax(dim=-1))


def test_tensor_ranks_divide_the_experts_and_then_their_columns():
    parallel = ParallelConfig(tensor=4, expert=2)
    parts = [partition_model(mixture(), parallel, rank, 4) for rank in range(4)]
    assert [part.experts for part in parts] == [range(2), range(2), range(2, 4), range(2, 4)]
    halves = [range(12), range(12, 24)]
    assert [part.expert_columns for part in parts] == halves + halves
    assert all(part.shared_expert_columns == range(0) for part in parts)


def test_without_expert_parallelism_each_rank_has_columns_of_all_experts():
    part = partition_model(
        mixture(shared_ffn_hidden_size=16), ParallelConfig(tensor=4, pipeline=2), 7, 8
    )
    assert part.experts == range(4)
    assert part.expert_columns == range(18, 24)
    assert part.shared_expert_columns == range(12, 16)


@pytest.mark.parametrize(
    ("changes", "parallel", "message"),
    [
        ({"count": 6}, {"tensor": 4, "expert": 4}, "6 experts cannot be divided by .*expert=4"),
        ({"ffn_hidden_size": 21}, {"tensor": 2}, "21 columns of an expert .* among the 2 ranks"),
        ({"shared_ffn_hidden_size": 9}, {"tensor": 2}, "9 columns of the shared expert cannot"),
        ({"dense_layers": frozenset({1})}, {"tensor": 2}, "33 feed-forward columns cannot be"),
    ],
)
def test_experts_that_cannot_be_divided_are_refused(monkeypatch, changes, parallel, message):
    for name in set(changes) & set(SIZES):
        monkeypatch.setitem(SIZES, name, changes[name])
    model = mixture(**{name: changes[name] for name in set(changes) - set(SIZES)})
    with pytest.raises(ValueError, match=message):
        partition_model(model, ParallelConfig(**parallel), 0, parallel["tensor"])


def test_too_many_choices_are_refused():
    with pytest.raises(ValueError, match="a token cannot choose 5 of 4 experts"):
        Experts(count=4, chosen=5, ffn_hidden_size=8, normalized=True)
