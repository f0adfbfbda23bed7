"""Gemma2ForCausalLM: Gemma with more norms, capped scores, and windows on every other layer."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from fastserve_mega.models.architecture import Architecture
from fastserve_mega.models.fields import Fields
from fastserve_mega.models.gemma import gemma_like
from fastserve_mega.models.llama import WEIGHTS, read_activation

WEIGHTS_WITH_POST_NORMS = dataclasses.replace(
    WEIGHTS,
    post_attention_norm="layers.{layer}.post_attention_layernorm",
    feed_forward_norm="layers.{layer}.pre_feedforward_layernorm",
    post_feed_forward_norm="layers.{layer}.post_feedforward_layernorm",
)


def read_architecture(fields: Fields) -> Architecture:
    """Map config.json of a Gemma 2."""
    gemma = post_norm_gemma(
        fields, attention_softcap=50.0, logit_softcap=30.0, weights=WEIGHTS_WITH_POST_NORMS
    )
    full = gemma.attention_kind(0)
    windowed = dataclasses.replace(full, window=fields.integer("sliding_window", 4096))
    kinds = tuple(windowed if flag else full for flag in windowed_layers(fields, pattern=2))
    return dataclasses.replace(gemma, layer_attention=kinds)


def post_norm_gemma(
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

    return gemma_like(
        fields,
        activation=read_activation(fields, "hidden_activation", "gelu_pytorch_tanh"),
        post_norms=True,
        attention_scale=1.0 / math.sqrt(fields.number("query_pre_attn_scalar", 256)),
        attention_softcap=limit("attn_logit_softcapping", attention_softcap),
        logit_softcap=limit("final_logit_softcapping", logit_softcap),
        **changes,
    )


def windowed_layers(fields: Fields, pattern: int) -> tuple[bool, ...]:
    """Which layers have a window: `layer_types`, or all but the last of each `pattern`."""
    num_layers = fields.integer("num_hidden_layers")
    types = fields.texts("layer_types")
    if types is None:
        return tuple((layer + 1) % pattern != 0 for layer in range(num_layers))
    unknown = set(types) - {"sliding_attention", "full_attention"}
    if unknown or len(types) != num_layers:
        raise ValueError(
            f"layer_types must name sliding_attention or full_attention for {num_layers} layers, "
            f"got {list(types)}"
        )
    return tuple(kind == "sliding_attention" for kind in types)
