"""LlamaForCausalLM: Llama 1 to 3.3, SmolLM2, and many others that share the architecture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from fastserve_mega.models.architecture import Activation, Architecture, Rope, RopeScaling
from fastserve_mega.models.fields import Fields
from fastserve_mega.models.weight_names import WeightNames

WEIGHTS = WeightNames(
    prefix="model.",
    embedding="embed_tokens",
    final_norm="norm",
    input_norm="layers.{layer}.input_layernorm",
    query="layers.{layer}.self_attn.q_proj",
    key="layers.{layer}.self_attn.k_proj",
    value="layers.{layer}.self_attn.v_proj",
    attention_output="layers.{layer}.self_attn.o_proj",
    feed_forward_norm="layers.{layer}.post_attention_layernorm",
    gate="layers.{layer}.mlp.gate_proj",
    up="layers.{layer}.mlp.up_proj",
    down="layers.{layer}.mlp.down_proj",
)

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def read_activation(fields: Fields, name: str, default: str) -> Activation:
    """Activation function by its Hugging Face name."""
    value = fields.text(name, default)
    if value not in _ACTIVATIONS:
        raise ValueError(
            f"{name}={value!r} is not supported; supported are {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[value]


def read_rope(fields: Fields, default_theta: float, *, may_be_partial: bool = False) -> Rope:
    """Rotary settings: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`.

    A `rope_scaling` that was added to a file of transformers 5, as model cards say, comes before
    what that file had, as in transformers, but for the base of the rotation.
    """
    theta = fields.number("rope_theta", default_theta)
    section = fields.section("rope_parameters")
    if fields.raw("rope_scaling"):
        theta = theta if section is None else section.number("rope_theta", theta)
        section = fields.section("rope_scaling")
    section = fields if section is None else section
    return rope_of(section, fields, theta, may_be_partial=may_be_partial)


def rope_of(section: Fields, fields: Fields, theta: float, *, may_be_partial: bool = False) -> Rope:
    """Rotary settings in a section of config.json, or in `fields`, which is all of it."""
    theta = section.number("rope_theta", theta)
    size = _rotated_size(section, fields, may_be_partial=may_be_partial)
    kind = section.text("rope_type", section.text("type", "default"))
    if kind == "default":
        if section.number("factor", 1.0) != 1.0:
            raise ValueError(f"a rope factor of {section.raw('factor')} needs a rope_type")
        return Rope(theta=theta, size=size)
    if kind not in _SCALINGS:
        raise ValueError(
            f"rope_type={kind!r} is not supported; supported are default, {', '.join(_SCALINGS)}"
        )
    return Rope(theta=theta, size=size, scaling=_SCALINGS[kind](section, fields))


def _rotated_size(section: Fields, fields: Fields, *, may_be_partial: bool) -> int | None:
    """Dimensions of a head that are rotated, None for all; the share may stand in either place."""
    share = section.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    if share == 1.0:
        return None
    if not may_be_partial:
        # transformers would rotate all of a head, other servers a part of it.
        raise ValueError(f"partial_rotary_factor={share} is not supported, only 1.0")
    return int(share * read_head_dim(fields))


def read_head_dim(fields: Fields) -> int:
    """Size of a head: as it is told, or what the heads leave of the hidden size."""
    heads = fields.integer("num_attention_heads")
    return fields.integer("head_dim", max(1, fields.integer("hidden_size") // heads))


def _linear(section: Fields, fields: Fields) -> RopeScaling:
    del fields
    return RopeScaling(kind="linear", factor=section.number("factor"))


def _llama3(section: Fields, fields: Fields) -> RopeScaling:
    del fields
    return RopeScaling(
        kind="llama3",
        factor=section.number("factor"),
        low_freq_factor=section.number("low_freq_factor"),
        high_freq_factor=section.number("high_freq_factor"),
        original_max_context=section.integer("original_max_position_embeddings"),
    )


def _yarn(section: Fields, fields: Fields) -> RopeScaling:
    longest = fields.integer("max_position_embeddings", 2048)
    original = section.integer("original_max_position_embeddings", longest)
    factor = section.number("factor", longest / original)
    return RopeScaling(
        kind="yarn",
        factor=factor,
        low_freq_factor=section.number("beta_slow", 1.0),
        high_freq_factor=section.number("beta_fast", 32.0),
        original_max_context=original,
        whole_pairs=section.flag("truncate", True),
        attention_factor=section.number("attention_factor", _yarn_attention(section, factor)),
    )


def _longrope(section: Fields, fields: Fields) -> RopeScaling:
    """One rotation for all requests: the one for long contexts, where such are served.

    The keys in the cache cannot be rotated anew when a request grows beyond the original context.
    """
    longest = fields.integer("max_position_embeddings", 2048)
    original = section.integer("original_max_position_embeddings", longest)
    original = fields.integer("original_max_position_embeddings", original)
    factor = section.number("factor", longest / original)
    growth = 1 + math.log(factor) / math.log(original) if factor > 1 and original > 1 else 1.0
    is_long = min(fields.context or longest, longest) > original
    return RopeScaling(
        kind="longrope",
        factor=factor,
        original_max_context=original,
        attention_factor=section.number("attention_factor", math.sqrt(growth)),
        pair_factors=section.numbers("long_factor" if is_long else "short_factor"),
    )


def _yarn_attention(section: Fields, factor: float) -> float:
    """How much sharper attention must be over a longer context, by the paper's formula."""

    def grow(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if section.raw("mscale") and section.raw("mscale_all_dim"):
        return grow(section.number("mscale")) / grow(section.number("mscale_all_dim"))
    return grow(1.0)


_SCALINGS: dict[str, Callable[[Fields, Fields], RopeScaling]] = {
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,  # its first name
}
"""By rope_type; each reads the section of that name, and the whole config.json beside it."""


def llama(fields: Fields) -> Architecture:
    """Map config.json of a Llama."""
    attention_bias = fields.flag("attention_bias", False)
    return llama_like(
        fields,
        qkv_bias=attention_bias,
        linear_bias=attention_bias or fields.flag("mlp_bias", False),
    )


def llama_like(
    fields: Fields,
    *,
    default_theta: float = 10000.0,
    may_be_partial: bool = False,
    **changes: Any,
) -> Architecture:
    """Architecture of a family that differs from Llama only in `changes`.

    Args:
        fields: config.json.
        default_theta: of the rotation, where config.json names none.
        may_be_partial: a part of each head may be rotated (`partial_rotary_factor`).
        **changes: fields of Architecture.
    """
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    rope = read_rope(fields, default_theta, may_be_partial=may_be_partial)
    llama = Architecture(
        name=fields.architecture,
        num_layers=fields.integer("num_hidden_layers"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=read_head_dim(fields),
        ffn_hidden_size=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        max_context=_max_context(fields, rope),
        norm="rms",
        norm_epsilon=fields.number("rms_norm_eps", 1e-6),
        activation=read_activation(fields, "hidden_act", "silu"),
        gated=True,
        positions=rope,
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        eos_token_ids=fields.eos_token_ids,
        weights=WEIGHTS,
    )
    return dataclasses.replace(llama, **changes)


def _max_context(fields: Fields, rope: Rope) -> int:
    """Adding yarn to a config.json, as Qwen's model cards say, leaves the old limit in place."""
    longest = fields.integer("max_position_embeddings", 2048)
    if rope.scaling is not None and rope.scaling.kind == "yarn":
        return max(longest, int(rope.scaling.factor * rope.scaling.original_max_context))
    return longest
