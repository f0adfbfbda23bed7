"""GemmaForCausalLM (Gemma 1 and CodeGemma)."""

from __future__ import annotations

import math

from fastserve_mega.models.architecture import Architecture
from fastserve_mega.models.fields import Fields
from fastserve_mega.models.llama import llama_like, read_activation


def read_architecture(fields: Fields) -> Architecture:
    """Map config.json of a Gemma; its first releases say `gelu` and mean the tanh approximation."""
    fields.require("attention_bias", supported=False, default=False)
    fields.require("use_bidirectional_attention", supported=None, default=None)
    activation = read_activation(fields, "hidden_act", "gelu_pytorch_tanh")
    return llama_like(
        fields,
        head_dim=fields.integer("head_dim", 256),
        activation="gelu_tanh" if activation == "gelu" else activation,
        tied_embeddings=fields.flag("tie_word_embeddings", True),
        zero_centered_norm=True,
        embedding_scale=math.sqrt(fields.integer("hidden_size")),
    )
