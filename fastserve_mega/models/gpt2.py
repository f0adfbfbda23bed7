"""GPT2LMHeadModel: GPT-2 and its descendants with the same configuration."""

from __future__ import annotations

from fastserve_mega.models.architecture import Architecture, LearnedPositions
from fastserve_mega.models.fields import Fields
from fastserve_mega.models.llama import read_activation
from fastserve_mega.models.weight_names import WeightNames

WEIGHTS = WeightNames(
    prefix="transformer.",
    embedding="wte",
    position_embedding="wpe",
    final_norm="ln_f",
    input_norm="h.{layer}.ln_1",
    fused_qkv="h.{layer}.attn.c_attn",
    attention_output="h.{layer}.attn.c_proj",
    feed_forward_norm="h.{layer}.ln_2",
    up="h.{layer}.mlp.c_fc",
    down="h.{layer}.mlp.c_proj",
    transposed=True,  # its Conv1D keeps [input, output]
)


def gpt2(fields: Fields) -> Architecture:
    """Map config.json of a GPT-2."""
    hidden_size = fields.integer("n_embd")
    num_heads = fields.integer("n_head")
    fields.require("scale_attn_weights", supported=True, default=True)
    fields.require("scale_attn_by_inverse_layer_idx", supported=False, default=False)
    fields.require("add_cross_attention", supported=False, default=False)
    return Architecture(
        name=fields.architecture,
        num_layers=fields.integer("n_layer"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=max(1, hidden_size // num_heads),
        ffn_hidden_size=fields.integer("n_inner", 4 * hidden_size),
        vocab_size=fields.integer("vocab_size"),
        max_context=fields.integer("n_positions", 1024),
        norm="layer",
        norm_epsilon=fields.number("layer_norm_epsilon", 1e-5),
        activation=read_activation(fields, "activation_function", "gelu_new"),
        gated=False,
        positions=LearnedPositions(),
        tied_embeddings=fields.flag("tie_word_embeddings", True),
        qkv_bias=True,
        linear_bias=True,
        eos_token_ids=fields.eos_token_ids,
        weights=WEIGHTS,
    )
