"""OPTForCausalLM: the family of the paper's evaluation (OPT-13B, 66B, 175B)."""

from __future__ import annotations

from fastserve_mega.models.architecture import Architecture, LearnedPositions
from fastserve_mega.models.fields import Fields
from fastserve_mega.models.llama import read_activation
from fastserve_mega.models.weight_names import WeightNames

WEIGHTS = WeightNames(
    prefix="model.",
    embedding="decoder.embed_tokens",
    position_embedding="decoder.embed_positions",
    final_norm="decoder.final_layer_norm",
    input_norm="decoder.layers.{layer}.self_attn_layer_norm",
    query="decoder.layers.{layer}.self_attn.q_proj",
    key="decoder.layers.{layer}.self_attn.k_proj",
    value="decoder.layers.{layer}.self_attn.v_proj",
    attention_output="decoder.layers.{layer}.self_attn.out_proj",
    feed_forward_norm="decoder.layers.{layer}.final_layer_norm",
    up="decoder.layers.{layer}.fc1",
    down="decoder.layers.{layer}.fc2",
)

POSITION_OFFSET = 2
"""The position table starts with two rows that are never used."""


def opt(fields: Fields) -> Architecture:
    """Map config.json of an OPT; OPT-350M (post-norm, projected embeddings) is refused."""
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    fields.require("do_layer_norm_before", supported=True, default=True)
    fields.require("word_embed_proj_dim", supported=hidden_size, default=hidden_size)
    fields.require("_remove_final_layer_norm", supported=False, default=False)
    fields.require("layer_norm_elementwise_affine", supported=True, default=True)
    bias = fields.flag("enable_bias", True)
    return Architecture(
        name=fields.architecture,
        num_layers=fields.integer("num_hidden_layers"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=max(1, hidden_size // num_heads),
        ffn_hidden_size=fields.integer("ffn_dim"),
        vocab_size=fields.integer("vocab_size"),
        max_context=fields.integer("max_position_embeddings", 2048),
        norm="layer",
        norm_epsilon=1e-5,  # fixed in the model's code
        activation=read_activation(fields, "activation_function", "relu"),
        gated=False,
        positions=LearnedPositions(first_row=POSITION_OFFSET),
        tied_embeddings=fields.flag("tie_word_embeddings", True),
        qkv_bias=bias,
        linear_bias=bias,
        eos_token_ids=fields.eos_token_ids,
        weights=WEIGHTS,
    )
