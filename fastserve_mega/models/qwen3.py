"""Qwen3ForCausalLM: Llama with normalized queries and keys."""

from __future__ import annotations

import dataclasses

from fastserve_mega.models.architecture import Architecture
from fastserve_mega.models.fields import Fields
from fastserve_mega.models.llama import WEIGHTS, llama_like


def read_architecture(fields: Fields) -> Architecture:
    """Map config.json of a Qwen 3; a window on some layers only is not supported."""
    fields.require("use_sliding_window", supported=False, default=False)
    attention_bias = fields.flag("attention_bias", False)
    return llama_like(
        fields,
        head_dim=fields.integer("head_dim", 128),
        qkv_bias=attention_bias,
        linear_bias=attention_bias,
        qk_norm=True,
        weights=dataclasses.replace(
            WEIGHTS,
            query_norm="layers.{layer}.self_attn.q_norm",
            key_norm="layers.{layer}.self_attn.k_norm",
        ),
    )
