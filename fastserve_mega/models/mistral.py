"""MistralForCausalLM: Llama with a sliding window."""

from __future__ import annotations

from fastserve_mega.models.architecture import Architecture
from fastserve_mega.models.fields import Fields
from fastserve_mega.models.llama import llama_like

DEFAULT_WINDOW = 4096
"""Window of a config.json that does not mention sliding_window."""


def read_architecture(fields: Fields) -> Architecture:
    """Map config.json of a Mistral; `sliding_window: null` is no window."""
    unlimited = fields.has("sliding_window") and fields.raw("sliding_window") is None
    window = None if unlimited else fields.integer("sliding_window", DEFAULT_WINDOW)
    return llama_like(fields, sliding_window=window)
