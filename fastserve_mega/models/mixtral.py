"""MixtralForCausalLM: Mistral with experts in place of each feed-forward layer."""

from __future__ import annotations

import dataclasses

from fastserve_mega.models.architecture import Architecture, Experts
from fastserve_mega.models.fields import Fields
from fastserve_mega.models.llama import WEIGHTS, llama_like
from fastserve_mega.models.weight_names import ExpertNames

_MIXTURE = "layers.{layer}.block_sparse_moe"

EXPERTS = ExpertNames(
    router=f"{_MIXTURE}.gate",
    gate=f"{_MIXTURE}.experts.{{expert}}.w1",
    up=f"{_MIXTURE}.experts.{{expert}}.w3",
    down=f"{_MIXTURE}.experts.{{expert}}.w2",
    fused="layers.{layer}.mlp",
)


def read_architecture(fields: Fields) -> Architecture:
    """Map config.json of a Mixtral; without `sliding_window` there is no window."""
    window = fields.raw("sliding_window")
    return llama_like(
        fields,
        default_theta=1_000_000.0,
        sliding_window=None if window is None else fields.integer("sliding_window"),
        experts=Experts(
            count=fields.integer("num_local_experts", 8),
            chosen=fields.integer("num_experts_per_tok", 2),
            ffn_hidden_size=fields.integer("intermediate_size"),
            normalized=True,
        ),
        weights=dataclasses.replace(WEIGHTS, experts=EXPERTS),
    )
