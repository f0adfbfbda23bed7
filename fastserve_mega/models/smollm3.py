"""SmolLM3ForCausalLM: Llama with layers that know no positions."""

from __future__ import annotations

import dataclasses

from fastserve_mega.models.architecture import Architecture, AttentionKind
from fastserve_mega.models.fields import Fields
from fastserve_mega.models.llama import llama_like


def smollm3(fields: Fields) -> Architecture:
    """Map config.json of a SmolLM3; a window on some layers only is not supported."""
    fields.require("use_sliding_window", supported=False, default=False)
    num_layers = fields.integer("num_hidden_layers")
    rotated = fields.whole_numbers("no_rope_layers")  # which holds 1 where there is rope
    if rotated is None:
        interval = fields.integer("no_rope_layer_interval", 4)
        rotated = tuple(int((layer + 1) % interval != 0) for layer in range(num_layers))
    if len(rotated) < num_layers:
        raise ValueError(f"no_rope_layers names {len(rotated)} layers of {num_layers}")
    attention_bias = fields.flag("attention_bias", False)
    llama = llama_like(
        fields,
        default_theta=2_000_000.0,
        tied_embeddings=fields.flag("tie_word_embeddings", True),
        qkv_bias=attention_bias,
        linear_bias=attention_bias or fields.flag("mlp_bias", False),
    )
    with_rope = llama.attention_kind(0)
    without = AttentionKind(rope=None, window=None)
    kinds = tuple(with_rope if flag else without for flag in rotated[:num_layers])
    return dataclasses.replace(llama, layer_attention=kinds)
