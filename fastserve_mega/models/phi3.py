"""Phi3ForCausalLM: Phi-3 mini and medium, Phi-3.5 mini, Phi-4 and Phi-4-mini."""

from __future__ import annotations

import dataclasses

from fastserve_mega.models.architecture import Architecture
from fastserve_mega.models.fields import Fields
from fastserve_mega.models.llama import WEIGHTS, llama_like

_WEIGHTS = dataclasses.replace(
    WEIGHTS,
    query=None,
    key=None,
    value=None,
    fused_qkv="layers.{layer}.self_attn.qkv_proj",
    gate=None,
    up=None,
    fused_gate_up="layers.{layer}.mlp.gate_up_proj",
)


def phi3(fields: Fields) -> Architecture:
    """Map config.json of a Phi-3 or Phi-4."""
    window = fields.raw("sliding_window")
    return llama_like(
        fields,
        may_be_partial=True,
        norm_epsilon=fields.number("rms_norm_eps", 1e-5),
        sliding_window=None if window is None else fields.integer("sliding_window"),
        weights=_WEIGHTS,
    )
