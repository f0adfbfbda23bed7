"""Qwen 2, 2.5 and 3, dense and with experts: Llama with biases, or norms, of queries and keys."""

from __future__ import annotations

import dataclasses

from fastserve_mega.models.architecture import Architecture, Experts
from fastserve_mega.models.fields import Fields
from fastserve_mega.models.llama import WEIGHTS, llama_like
from fastserve_mega.models.weight_names import ExpertNames

_MIXTURE = "layers.{layer}.mlp"

_EXPERTS_2 = ExpertNames(
    router=f"{_MIXTURE}.gate",
    gate=f"{_MIXTURE}.experts.{{expert}}.gate_proj",
    up=f"{_MIXTURE}.experts.{{expert}}.up_proj",
    down=f"{_MIXTURE}.experts.{{expert}}.down_proj",
    fused=_MIXTURE,
    shared_gate=f"{_MIXTURE}.shared_expert.gate_proj",
    shared_up=f"{_MIXTURE}.shared_expert.up_proj",
    shared_down=f"{_MIXTURE}.shared_expert.down_proj",
    shared_router=f"{_MIXTURE}.shared_expert_gate",
)
_EXPERTS_3 = dataclasses.replace(
    _EXPERTS_2, shared_gate=None, shared_up=None, shared_down=None, shared_router=None
)


def qwen2(fields: Fields) -> Architecture:
    """Map config.json of a Qwen 2; a window on some layers only is not supported."""
    fields.require("use_sliding_window", supported=False, default=False)
    return llama_like(fields, qkv_bias=True)


def qwen3(fields: Fields) -> Architecture:
    """Map config.json of a Qwen 3; a window on some layers only is not supported."""
    fields.require("use_sliding_window", supported=False, default=False)
    attention_bias = fields.flag("attention_bias", False)
    return llama_like(
        fields,
        head_dim=fields.integer("head_dim", 128),
        qkv_bias=attention_bias,
        linear_bias=attention_bias,
        qk_norm="head",
        weights=dataclasses.replace(
            WEIGHTS,
            query_norm="layers.{layer}.self_attn.q_norm",
            key_norm="layers.{layer}.self_attn.k_norm",
        ),
    )


def qwen2_moe(fields: Fields) -> Architecture:
    """Map config.json of a Qwen 2 MoE; a window on some layers only is not supported."""
    fields.require("use_sliding_window", supported=False, default=False)
    return llama_like(
        fields,
        qkv_bias=fields.flag("qkv_bias", True),
        experts=_read_experts(
            fields,
            count=fields.integer("num_experts", 60),
            chosen=fields.integer("num_experts_per_tok", 4),
            ffn_hidden_size=fields.integer("moe_intermediate_size", 1408),
            shared_ffn_hidden_size=fields.integer("shared_expert_intermediate_size", 5632),
        ),
        weights=dataclasses.replace(WEIGHTS, experts=_EXPERTS_2),
    )


def qwen3_moe(fields: Fields) -> Architecture:
    """Map config.json of a Qwen 3 MoE; biases in the attention are not supported."""
    fields.require("attention_bias", supported=False, default=False)
    dense = qwen3(fields)
    return dataclasses.replace(
        dense,
        # Unlike the dense Qwen 3, whose default is 128.
        head_dim=fields.integer("head_dim", max(1, dense.hidden_size // dense.num_heads)),
        experts=_read_experts(
            fields,
            # transformers 5 writes the second name.
            count=fields.integer("num_experts", fields.integer("num_local_experts", 128)),
            chosen=fields.integer("num_experts_per_tok", 8),
            ffn_hidden_size=fields.integer("moe_intermediate_size", 768),
        ),
        weights=dataclasses.replace(dense.weights, experts=_EXPERTS_3),
    )


def _read_experts(
    fields: Fields,
    *,
    count: int,
    chosen: int,
    ffn_hidden_size: int,
    shared_ffn_hidden_size: int | None = None,
) -> Experts:
    """The mixture of a Qwen, with the layers that `mlp_only_layers` and the step leave dense."""
    step = fields.integer("decoder_sparse_step", 1)
    dense = set(fields.whole_numbers("mlp_only_layers") or ())
    layers = range(fields.integer("num_hidden_layers"))
    return Experts(
        count=count,
        chosen=chosen,
        ffn_hidden_size=ffn_hidden_size,
        normalized=fields.flag("norm_topk_prob", False),
        shared_ffn_hidden_size=shared_ffn_hidden_size,
        dense_layers=frozenset(
            layer for layer in layers if layer in dense or (layer + 1) % step != 0
        ),
    )
