"""MistralForCausalLM: Llama with a sliding window."""

from __future__ import annotations

from fastserve_mega.models.architecture import Architecture
from fastserve_mega.models.fields import Fields
from fastserve_mega.models.llama import llama_like


def read_architecture(fields: Fields) -> Architecture:
    """Map config.json of a Mistral; `sliding_window: null` is no window."""
    window = fields.integer("sliding_window") if fields.raw("sliding_window") else None
    return llama_like(fields, sliding_window=window)
