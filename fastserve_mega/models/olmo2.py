"""Olmo2ForCausalLM: OLMo 2, whose norms stand behind attention and feed-forward layers."""

from __future__ import annotations

import dataclasses

from fastserve_mega.models.architecture import Architecture
from fastserve_mega.models.fields import Fields
from fastserve_mega.models.llama import WEIGHTS, llama_like

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
    fields.require("attention_bias", supported=False, default=False)
    return llama_like(
        fields,
        norm_epsilon=fields.number("rms_norm_eps", 1e-5),
        pre_norms=False,
        post_norms=True,
        qk_norm="projection",
        weights=_WEIGHTS,
    )
