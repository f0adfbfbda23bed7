"""GemmaForCausalLM (Gemma 1 and CodeGemma), and what its successors share with it."""

from __future__ import annotations

import math
from typing import Any

from fastserve_mega.models.architecture import Architecture
from fastserve_mega.models.fields import Fields
from fastserve_mega.models.llama import llama_like, read_activation


def read_architecture(fields: Fields) -> Architecture:
    """Map config.json of a Gemma; its first releases say `gelu` and mean the tanh approximation."""
    activation = read_activation(fields, "hidden_act", "gelu_pytorch_tanh")
    return gemma_like(fields, activation="gelu_tanh" if activation == "gelu" else activation)


def gemma_like(fields: Fields, **changes: Any) -> Architecture:
    """Architecture of a family that differs from Gemma only in `changes`."""
    fields.require("attention_bias", supported=False, default=False)
    if fields.flag("use_bidirectional_attention", False):
        raise ValueError("use_bidirectional_attention=True is not supported: it cannot generate")
    gemma = {
        "head_dim": fields.integer("head_dim", 256),
        "tied_embeddings": fields.flag("tie_word_embeddings", True),
        "zero_centered_norm": True,
        "embedding_scale": math.sqrt(fields.integer("hidden_size")),
    }
    return llama_like(fields, **{**gemma, **changes})
