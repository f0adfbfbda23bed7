"""Mistral, which is Llama with a sliding window; and Mixtral, Mistral with experts."""

from __future__ import annotations

import dataclasses

from fastserve_mega.models.architecture import Architecture, Experts
from fastserve_mega.models.fields import Fields
from fastserve_mega.models.llama import WEIGHTS, llama_like
from fastserve_mega.models.weight_names import ExpertNames

DEFAULT_WINDOW = 4096
"""Window of a config.json that does not mention sliding_window."""
_MIXTURE = "layers.{layer}.block_sparse_moe"

EXPERTS = ExpertNames(
    router=f"{_MIXTURE}.gate",
    gate=f"{_MIXTURE}.experts.{{expert}}.w1",
    up=f"{_MIXTURE}.experts.{{expert}}.w3",
    down=f"{_MIXTURE}.experts.{{expert}}.w2",
    fused="layers.{layer}.mlp",
)


def mistral(fields: Fields) -> Architecture:
    """Map config.json of a Mistral; `sliding_window: null` is no window."""
    unlimited = fields.has("sliding_window") and fields.raw("sliding_window") is None
    window = None if unlimited else fields.integer("sliding_window", DEFAULT_WINDOW)
    return llama_like(fields, sliding_window=window)


def mixtral(fields: Fields) -> Architecture:
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
