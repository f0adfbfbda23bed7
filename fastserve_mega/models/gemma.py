"""Gemma 1 (with CodeGemma), 2, and the text models of 3."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from fastserve_mega.models.architecture import Architecture, AttentionKind, Rope
from fastserve_mega.models.fields import Fields
from fastserve_mega.models.layer_kinds import ropes_by_kind, windowed_layers
from fastserve_mega.models.llama import WEIGHTS, llama_like, read_activation, read_rope

_WEIGHTS_WITH_POST_NORMS = dataclasses.replace(
    WEIGHTS,
    post_attention_norm="layers.{layer}.post_attention_layernorm",
    feed_forward_norm="layers.{layer}.pre_feedforward_layernorm",
    post_feed_forward_norm="layers.{layer}.post_feedforward_layernorm",
)


_GEMMA3_4B = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
}
"""What config.json of Gemma 3 4B does not name."""


def gemma(fields: Fields) -> Architecture:
    """Map config.json of a Gemma; its first releases say `gelu` and mean the tanh approximation."""
    activation = read_activation(fields, "hidden_act", "gelu_pytorch_tanh")
    return _gemma_like(fields, activation="gelu_tanh" if activation == "gelu" else activation)


def gemma2(fields: Fields) -> Architecture:
    """Map config.json of a Gemma 2."""
    with_softcap = _post_norm_gemma(
        fields, attention_softcap=50.0, logit_softcap=30.0, weights=_WEIGHTS_WITH_POST_NORMS
    )
    full = with_softcap.attention_kind(0)
    windowed = dataclasses.replace(full, window=fields.integer("sliding_window", 4096))
    kinds = tuple(windowed if flag else full for flag in windowed_layers(fields, pattern=2))
    return dataclasses.replace(with_softcap, layer_attention=kinds)


def gemma3(fields: Fields) -> Architecture:
    """Map config.json of a Gemma 3; layers with and without a window rotate differently."""
    fields = fields.with_defaults(_GEMMA3_4B)
    full, local = _ropes(fields)
    pattern = fields.integer("sliding_window_pattern", 6)
    window = fields.integer("sliding_window", 4096)
    kinds = {
        False: AttentionKind(rope=full, window=None),
        True: AttentionKind(rope=local, window=window),
    }
    return _post_norm_gemma(
        fields,
        attention_softcap=None,
        logit_softcap=None,
        positions=full,
        layer_attention=tuple(kinds[flag] for flag in windowed_layers(fields, pattern)),
        qk_norm="head",
        weights=dataclasses.replace(
            _WEIGHTS_WITH_POST_NORMS,
            query_norm="layers.{layer}.self_attn.q_norm",
            key_norm="layers.{layer}.self_attn.k_norm",
        ),
    )


def _gemma_like(fields: Fields, **changes: Any) -> Architecture:
    """Architecture of a family that differs from Gemma only in `changes`."""
    fields.require("attention_bias", supported=False, default=False)
    if fields.flag("use_bidirectional_attention", False):
        raise ValueError("use_bidirectional_attention=True is not supported: it cannot generate")
    common = {
        "head_dim": fields.integer("head_dim", 256),
        "tied_embeddings": fields.flag("tie_word_embeddings", True),
        "zero_centered_norm": True,
        "embedding_scale": math.sqrt(fields.integer("hidden_size")),
    }
    return llama_like(fields, **{**common, **changes})


def _post_norm_gemma(
    fields: Fields,
    *,
    attention_softcap: float | None,
    logit_softcap: float | None,
    **changes: Any,
) -> Architecture:
    """What Gemma 2 and 3 share; the two limits are for a config.json that does not name them."""

    def limit(name: str, default: float | None) -> float | None:
        absent = fields.raw(name) is None
        return (None if fields.has(name) else default) if absent else fields.number(name)

    return _gemma_like(
        fields,
        activation=read_activation(fields, "hidden_activation", "gelu_pytorch_tanh"),
        post_norms=True,
        attention_scale=1.0 / math.sqrt(fields.number("query_pre_attn_scalar", 256)),
        attention_softcap=limit("attn_logit_softcapping", attention_softcap),
        logit_softcap=limit("final_logit_softcapping", logit_softcap),
        **changes,
    )


def _ropes(fields: Fields) -> tuple[Rope, Rope]:
    """Rotations of the layers that see everything, and of those with a window."""
    by_layer = fields.section("rope_parameters")
    if by_layer is None:
        local = Rope(theta=fields.number("rope_local_base_freq", 10_000.0))
        return read_rope(fields, default_theta=1_000_000.0), local
    return ropes_by_kind(by_layer, fields, (1_000_000.0, 10_000.0))
