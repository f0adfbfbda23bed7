"""Qwen2ForCausalLM (Qwen 2 and 2.5): Llama with biases on query, key and value."""

from __future__ import annotations

from fastserve_mega.models.architecture import Architecture
from fastserve_mega.models.fields import Fields
from fastserve_mega.models.llama import llama_like


def read_architecture(fields: Fields) -> Architecture:
    """Map config.json of a Qwen 2; a window on some layers only is not supported."""
    fields.require("use_sliding_window", supported=False, default=False)
    return llama_like(fields, qkv_bias=True)
