"""Qwen3MoeForCausalLM: Qwen 3 with experts."""

from __future__ import annotations

import dataclasses

from fastserve_mega.models import qwen2_moe, qwen3
from fastserve_mega.models.architecture import Architecture
from fastserve_mega.models.fields import Fields

EXPERTS = dataclasses.replace(
    qwen2_moe.EXPERTS, shared_gate=None, shared_up=None, shared_down=None, shared_router=None
)


def read_architecture(fields: Fields) -> Architecture:
    """Map config.json of a Qwen 3 MoE; biases in the attention are not supported."""
    fields.require("attention_bias", supported=False, default=False)
    dense = qwen3.read_architecture(fields)
    return dataclasses.replace(
        dense,
        # Unlike the dense Qwen 3, whose default is 128.
        head_dim=fields.integer("head_dim", max(1, dense.hidden_size // dense.num_heads)),
        experts=qwen2_moe.read_experts(
            fields,
            # transformers 5 writes the second name.
            count=fields.integer("num_experts", fields.integer("num_local_experts", 128)),
            chosen=fields.integer("num_experts_per_tok", 8),
            ffn_hidden_size=fields.integer("moe_intermediate_size", 768),
        ),
        weights=dataclasses.replace(dense.weights, experts=EXPERTS),
    )
