"""Gemma3ForCausalLM: the text models of Gemma 3 (270M, 1B)."""

from __future__ import annotations

import dataclasses

from fastserve_mega.models.architecture import Architecture, AttentionKind, Rope
from fastserve_mega.models.fields import Fields
from fastserve_mega.models.gemma2 import (
    WEIGHTS_WITH_POST_NORMS,
    post_norm_gemma,
    windowed_layers,
)
from fastserve_mega.models.llama import read_rope, rope_of


def read_architecture(fields: Fields) -> Architecture:
    """Map config.json of a Gemma 3; layers with and without a window rotate differently."""
    full, local = _ropes(fields)
    pattern = fields.integer("sliding_window_pattern", 6)
    window = fields.integer("sliding_window", 4096)
    kinds = {
        False: AttentionKind(rope=full, window=None),
        True: AttentionKind(rope=local, window=window),
    }
    return post_norm_gemma(
        fields,
        attention_softcap=None,
        logit_softcap=None,
        positions=full,
        layer_attention=tuple(kinds[flag] for flag in windowed_layers(fields, pattern)),
        qk_norm=True,
        weights=dataclasses.replace(
            WEIGHTS_WITH_POST_NORMS,
            query_norm="layers.{layer}.self_attn.q_norm",
            key_norm="layers.{layer}.self_attn.k_norm",
        ),
    )


def _ropes(fields: Fields) -> tuple[Rope, Rope]:
    """Rotations of the layers that see everything, and of those with a window."""
    by_layer = fields.section("rope_parameters")
    if by_layer is None:
        local = Rope(theta=fields.number("rope_local_base_freq", 10_000.0))
        return read_rope(fields, default_theta=1_000_000.0), local
    if fields.raw("rope_scaling"):
        raise ValueError("rope_scaling must stand in rope_parameters, where config.json has those")
    sections = [by_layer.section(f"{kind}_attention") for kind in ("full", "sliding")]
    ropes = [
        Rope(theta=theta) if section is None else rope_of(section, fields, theta)
        for section, theta in zip(sections, (1_000_000.0, 10_000.0), strict=True)
    ]
    return ropes[0], ropes[1]
