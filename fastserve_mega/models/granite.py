"""GraniteForCausalLM: IBM's dense Granite 3, a Llama with four multipliers."""

from __future__ import annotations

from fastserve_mega.models.architecture import Architecture
from fastserve_mega.models.fields import Fields
from fastserve_mega.models.llama import llama_like


def granite(fields: Fields) -> Architecture:
    """Map config.json of a Granite."""
    attention_bias = fields.flag("attention_bias", False)
    return llama_like(
        fields,
        qkv_bias=attention_bias,
        linear_bias=attention_bias or fields.flag("mlp_bias", False),
        embedding_scale=fields.number("embedding_multiplier", 1.0),
        attention_scale=fields.number("attention_multiplier", 1.0),
        residual_scale=fields.number("residual_multiplier", 1.0),
        logit_scale=1.0 / fields.number("logits_scaling", 1.0),
    )
