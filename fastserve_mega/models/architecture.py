"""What a model looks like, read from a Hugging Face directory with plain JSON."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fastserve_mega.models.fields import Fields, read_eos_token_ids, read_json, text_config
from fastserve_mega.models.quantization import read_weight_block
from fastserve_mega.models.weight_names import WeightNames

_FAMILIES = {
    "LlamaForCausalLM": "llama.llama",
    "MistralForCausalLM": "mistral.mistral",
    "Mistral3ForConditionalGeneration": "mistral.mistral",
    "MixtralForCausalLM": "mistral.mixtral",
    "Qwen2ForCausalLM": "qwen.qwen2",
    "Qwen2MoeForCausalLM": "qwen.qwen2_moe",
    "Qwen3ForCausalLM": "qwen.qwen3",
    "Qwen3MoeForCausalLM": "qwen.qwen3_moe",
    "SmolLM3ForCausalLM": "smollm3.smollm3",
    "GemmaForCausalLM": "gemma.gemma",
    "Gemma2ForCausalLM": "gemma.gemma2",
    "Gemma3ForCausalLM": "gemma.gemma3",
    "Gemma3ForConditionalGeneration": "gemma.gemma3",
    "Phi3ForCausalLM": "phi3.phi3",
    "Olmo2ForCausalLM": "olmo.olmo2",
    "Olmo3ForCausalLM": "olmo.olmo3",
    "GraniteForCausalLM": "granite.granite",
    "OPTForCausalLM": "opt.opt",
    "GPT2LMHeadModel": "gpt2.gpt2",
}
"""Name in config.json → module of this package, and its function from `Fields` to Architecture."""

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How the rotary frequencies of a model are stretched beyond its training context."""

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    factor: float
    low_freq_factor: float = 1.0
    """Turns within the original context up to which a frequency is slowed down by the factor."""
    high_freq_factor: float = 1.0
    """Turns from which on it is kept; in between, llama3 blends by turns and yarn by pairs."""
    original_max_context: int = 0
    """Tokens; not used by linear, and neither are the two frequency factors."""
    whole_pairs: bool = True
    """The range in which yarn blends is rounded outwards to whole pairs of dimensions."""
    attention_factor: float = 1.0
    """What yarn and longrope multiply the rotated queries and keys by."""
    pair_factors: tuple[float, ...] = ()
    """By what longrope slows down each pair, for the context that is served."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary position embedding: pairs (i, i + size / 2) of the first `size` dimensions turn."""

    theta: float
    size: int | None = None
    """Dimensions of a head that are rotated, an even number; None: all of them."""
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedPositions:
    """A table of position embeddings, added to the token embeddings."""

    first_row: int = 0
    """Row of position 0 in the checkpoint's table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionKind:
    """How the attention of a layer treats positions."""

    rope: Rope | None
    """None where nothing is rotated: learned positions, or a layer without any."""
    window: int | None
    """A token attends to this many tokens at most, itself included; None is no limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The mixture of experts in place of the feed-forward layer; each is gated, without biases.

    A router's softmax over all experts weighs the `chosen` best for each token.

    Raises:
        ValueError: more experts are chosen than there are.
    """

    count: int
    chosen: int
    ffn_hidden_size: int
    """Size of one expert."""
    normalized: bool
    """The weights of a token's chosen experts are scaled to a sum of 1."""
    shared_ffn_hidden_size: int | None = None
    """Size of an expert for all tokens, weighed by the sigmoid of a gate; None without one."""
    dense_layers: frozenset[int] = frozenset()
    """Layers that have the plain feed-forward layer."""

    def __post_init__(self) -> None:
        if self.chosen > self.count:
            raise ValueError(f"a token cannot choose {self.chosen} of {self.count} experts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A decoder-only transformer with norms before or after attention and feed-forward layers.

    Raises:
        ValueError: sizes contradict each other; the message names values and limits.
    """

    name: str
    """As in config.json, for example LlamaForCausalLM."""
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    max_context: int
    """Tokens of prompt and answer together that the model can attend to."""
    norm: Literal["rms", "layer"]
    norm_epsilon: float
    activation: Activation
    gated: bool
    """The feed-forward layer multiplies activation(gate) by a second projection."""
    positions: Rope | LearnedPositions
    tied_embeddings: bool
    """The output layer is the embedding table."""
    qkv_bias: bool = False
    linear_bias: bool = False
    """The output projection and the feed-forward layers have biases; where the checkpoint has
    only some of them, the others are zero."""
    qk_norm: Literal["head", "projection"] | None = None
    """Queries and keys are normalized, those of each head or those of all heads together."""
    sliding_window: int | None = None
    """A token attends to this many tokens at most, itself included; None is no limit."""
    layer_attention: tuple[AttentionKind, ...] = ()
    """Kind of each layer, where they differ; else `positions` and `sliding_window` say it all."""
    experts: Experts | None = None
    zero_centered_norm: bool = False
    """The weights of the norms are kept as their difference from 1."""
    pre_norms: bool = True
    """There are norms before attention and feed-forward layer."""
    post_norms: bool = False
    """What attention and feed-forward layer add to the residual is normalized as well."""
    residual_scale: float = 1.0
    """What attention and feed-forward layer add to the residual is multiplied by this."""
    attention_scale: float | None = None
    """Scores are multiplied by this; None is 1 / sqrt(head_dim)."""
    attention_softcap: float | None = None
    """Scores are squeezed into (-softcap, softcap) by a tanh; None leaves them."""
    logit_scale: float = 1.0
    """Logits are multiplied by this, before their soft cap."""
    logit_softcap: float | None = None
    """Soft cap of the logits."""
    embedding_scale: float = 1.0
    """Embeddings are multiplied by this, rounded to the model's precision."""
    weight_block: tuple[int, int] | None = None
    """Outputs and inputs of a block of a weight that has a scale of its own, in a checkpoint whose
    weights are quantized so."""
    eos_token_ids: tuple[int, ...] = ()
    """From generation_config.json and config.json together."""
    weights: WeightNames

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads != 0:
            raise ValueError(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} key-value "
                f"heads evenly"
            )
        if isinstance(self.positions, Rope):
            self._check_rotation(self.positions)
        if self.layer_attention and len(self.layer_attention) != self.num_layers:
            raise ValueError(
                f"{self.num_layers} layers, but {len(self.layer_attention)} kinds of attention"
            )

    def _check_rotation(self, rope: Rope) -> None:
        size = self.head_dim if rope.size is None else rope.size
        if size % 2 != 0 or not 0 < size <= self.head_dim:
            what = "head_dim" if rope.size is None else f"size of at most {self.head_dim}"
            raise ValueError(f"rotary embedding needs an even {what}, got {size}")
        factors = rope.scaling.pair_factors if rope.scaling else ()
        if factors and len(factors) != size // 2:
            raise ValueError(
                f"longrope needs a factor for each of {size // 2} pairs, got {len(factors)}"
            )

    def attention_kind(self, layer: int) -> AttentionKind:
        """How a layer, by its number in the whole model, treats positions."""
        if self.layer_attention:
            return self.layer_attention[layer]
        rope = self.positions if isinstance(self.positions, Rope) else None
        return AttentionKind(rope=rope, window=self.sliding_window)

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts in place of the plain feed-forward layer."""
        return self.experts is not None and layer not in self.experts.dense_layers


def load_architecture(directory: Path, context: int | None = None) -> Architecture:
    """Read config.json (and generation_config.json, if any) of a Hugging Face directory.

    Args:
        directory: of the model.
        context: tokens of the longest request, model.max_context; None: all that the model has.
            Models with several rotations have the one for that.

    Raises:
        ValueError: not a model directory, an unknown architecture, or a value that is missing,
            malformed or not supported; the message names the file and the value.
    """
    path = directory / "config.json"
    config = read_json(path)
    if config is None:
        raise ValueError(f"{directory} is not a model directory: {_why_no_model(directory)}")
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else names
    if not isinstance(name, str) or name not in _FAMILIES:
        raise ValueError(
            f"{path}: architecture {name!r} is not supported; supported are "
            f"{', '.join(sorted(_FAMILIES))}"
        )
    module, _, reader = _FAMILIES[name].partition(".")
    read_family = getattr(importlib.import_module(f"fastserve_mega.models.{module}"), reader)
    eos_token_ids = read_eos_token_ids(directory, config)
    try:
        config = text_config(config)
        fields = Fields(config, name, eos_token_ids, context)
        architecture = read_family(fields)
        _check_layer_types(fields, architecture)
        block = read_weight_block(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(architecture, Architecture):
        raise TypeError(f"family {name} returned {type(architecture).__name__}")
    return architecture if block is None else replace(architecture, weight_block=block)


def _check_layer_types(fields: Fields, architecture: Architecture) -> None:
    """Refuse a list of the layers' kinds that is not what is computed."""
    types = fields.texts("layer_types")
    if types is None:
        return
    if len(types) != architecture.num_layers:
        raise ValueError(f"layer_types names {len(types)} layers of {architecture.num_layers}")
    for layer, named in enumerate(types):
        window = architecture.attention_kind(layer).window
        computed = "full_attention" if window is None else "sliding_attention"
        if named != computed:
            raise ValueError(
                f"layer_types names {named} for layer {layer}, which by its other values "
                f"{architecture.name} computes with {computed}"
            )


def _why_no_model(directory: Path) -> str:
    """What is there in place of a directory with a config.json."""
    if not directory.is_dir():
        return "it is a file" if directory.exists() else "it does not exist"
    if (directory / "adapter_config.json").is_file():
        return "it has an adapter, to be merged into its base model first, and no config.json"
    others = sorted(path.name for kind in ("*.gguf", "*.nemo") for path in directory.glob(kind))
    return "it has no config.json" + (
        f", but {others[0]}, which is not supported" if others else ""
    )
