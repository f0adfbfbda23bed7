"""OLMo 2 and 3, whose norms stand behind attention and feed-forward layers."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastserve_mega.models.architecture import Architecture, AttentionKind, Rope
from fastserve_mega.models.fields import Fields
from fastserve_mega.models.layer_kinds import ropes_by_kind, windowed_layers
from fastserve_mega.models.llama import WEIGHTS, llama_like, read_rope

_WEIGHTS = dataclasses.replace(
    WEIGHTS,
    input_norm=None,
    query_norm="layers.{layer}.self_attn.q_norm",
    key_norm="layers.{layer}.self_attn.k_norm",
    post_attention_norm="layers.{layer}.post_attention_layernorm",
    feed_forward_norm=None,
    post_feed_forward_norm="layers.{layer}.post_feedforward_layernorm",
)


def olmo2(fields: Fields) -> Architecture:
    """Map config.json of an OLMo 2."""
    return _olmo(fields)


def olmo3(fields: Fields) -> Architecture:
    """Map config.json of an OLMo 3; only its layers without a window stretch their rotation."""
    full, local = _ropes(fields)
    window = fields.integer("sliding_window", 4096)
    kinds = {
        False: AttentionKind(rope=full, window=None),
        True: AttentionKind(rope=local, window=window),
    }
    layers = windowed_layers(fields, pattern=4)
    return _olmo(fields, positions=full, layer_attention=tuple(kinds[flag] for flag in layers))


def _ropes(fields: Fields) -> tuple[Rope, Rope]:
    """Rotations of the layers that see everything, and of those with a window."""
    theta = fields.number("rope_theta", 500_000.0)
    by_kind = fields.section("rope_parameters")
    if by_kind is None:
        return read_rope(fields, theta), Rope(theta=theta)
    return ropes_by_kind(by_kind, fields, (theta, theta))


def _olmo(fields: Fields, **changes: Any) -> Architecture:
    """Architecture of a family that differs from OLMo 2 only in `changes`."""
    fields.require("attention_bias", supported=False, default=False)
    return llama_like(
        fields,
        norm_epsilon=fields.number("rms_norm_eps", 1e-5),
        pre_norms=False,
        post_norms=True,
        qk_norm="projection",
        weights=_WEIGHTS,
        **changes,
    )
