from __future__ import annotations

import pytest
from model_configs import LLAMA, OPT, QWEN

from fastserve_mega.models.architecture import (
    AttentionKind,
    Experts,
    LearnedPositions,
    Rope,
    RopeScaling,
)


def test_llama_sizes_and_defaults(load):
    llama = load(LLAMA)
    assert (llama.num_layers, llama.num_heads, llama.num_kv_heads, llama.head_dim) == (2, 4, 2, 16)
    assert (llama.norm, llama.activation, llama.gated) == ("rms", "silu", True)
    assert llama.positions == Rope(theta=10000.0)
    assert not llama.tied_embeddings
    assert llama.weights.query == "layers.{layer}.self_attn.q_proj"


def test_end_tokens_come_from_both_files_without_duplicates(load):
    assert load(LLAMA).eos_token_ids == (2,)
    assert load(LLAMA, {"eos_token_id": [7, 2, 9]}).eos_token_ids == (7, 2, 9)
    assert load({**LLAMA, "eos_token_id": None}, {}).eos_token_ids == ()


def test_rope_in_both_notations(load):
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    old = load({**LLAMA, "rope_theta": 500000.0, "rope_scaling": llama3})
    new = load({**LLAMA, "rope_parameters": {**llama3, "rope_theta": 500000.0}})
    assert old.positions == new.positions
    assert isinstance(old.positions, Rope)
    assert old.positions.theta == 500000.0
    assert old.positions.scaling is not None
    assert old.positions.scaling.original_max_context == 64
    linear = load({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2}})
    assert isinstance(linear.positions, Rope)
    assert linear.positions.scaling is not None
    assert linear.positions.scaling.kind == "linear"


def test_mistral_window(load):
    mistral = {**LLAMA, "architectures": ["MistralForCausalLM"]}
    assert load({**mistral, "sliding_window": None}).sliding_window is None
    assert load({**mistral, "sliding_window": 128}).sliding_window == 128
    windows = {"sliding_window": 128, "layer_types": ["sliding_attention"] * 2}
    assert load({**mistral, **windows}).sliding_window == 128
    assert load(mistral).sliding_window == 4096


def test_qwen_biases_and_norms(load):
    qwen2 = load({**QWEN, "architectures": ["Qwen2ForCausalLM"]})
    assert qwen2.qkv_bias
    assert not qwen2.linear_bias
    assert qwen2.sliding_window is None
    qwen3 = load({**QWEN, "architectures": ["Qwen3ForCausalLM"]})
    assert qwen3.qk_norm
    assert qwen3.head_dim == 128
    assert not qwen3.qkv_bias


def mixture(name, **fields):
    return {**QWEN, "architectures": [f"{name}ForCausalLM"], "num_experts_per_tok": 2, **fields}


def test_mixtures_by_their_own_names(load):
    mixtral = load({**mixture("Mixtral"), "num_local_experts": 4, "sliding_window": None})
    assert mixtral.experts == Experts(count=4, chosen=2, ffn_hidden_size=96, normalized=True)
    assert mixtral.sliding_window is None
    assert mixtral.positions == Rope(theta=1_000_000.0)
    sizes = {"num_experts": 6, "moe_intermediate_size": 40}
    qwen2 = load(mixture("Qwen2Moe", shared_expert_intermediate_size=48, **sizes))
    assert qwen2.experts == Experts(
        count=6, chosen=2, ffn_hidden_size=40, normalized=False, shared_ffn_hidden_size=48
    )
    assert qwen2.qkv_bias
    qwen3 = load(mixture("Qwen3Moe", norm_topk_prob=True, **sizes))
    assert qwen3.experts == Experts(count=6, chosen=2, ffn_hidden_size=40, normalized=True)
    assert qwen3.qk_norm
    assert qwen3.head_dim == 16
    renamed = load(mixture("Qwen3Moe", num_local_experts=6, moe_intermediate_size=40))
    assert renamed.experts is not None
    assert renamed.experts.count == 6


def test_which_layers_of_a_mixture_are_dense(load):
    sparse = load(mixture("Qwen3Moe", num_hidden_layers=6, decoder_sparse_step=2))
    assert [sparse.has_experts(layer) for layer in range(6)] == [False, True] * 3
    some = load(mixture("Qwen3Moe", num_hidden_layers=3, mlp_only_layers=[0, 2]))
    assert [some.has_experts(layer) for layer in range(3)] == [False, True, False]
    with pytest.raises(ValueError, match=r"mlp_only_layers must be a list of whole numbers, got"):
        load(mixture("Qwen3Moe", mlp_only_layers="0"))
    assert not load(LLAMA).has_experts(0)


def test_smollm3_has_layers_without_positions(load):
    smollm3 = {**LLAMA, "architectures": ["SmolLM3ForCausalLM"], "num_hidden_layers": 5}
    model = load(smollm3)
    assert [model.attention_kind(layer).rope is None for layer in range(5)] == [
        False, False, False, True, False,
    ]  # fmt: skip
    assert model.attention_kind(0).rope == Rope(theta=2_000_000.0)
    named = load({**smollm3, "no_rope_layers": [1, 0, 1, 1, 0, 1, 1]})
    assert [named.attention_kind(layer).rope is None for layer in range(5)] == [
        False, True, False, False, True,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no_rope_layers names 2 layers of 5"):
        load({**smollm3, "no_rope_layers": [1, 0]})


def test_gemma_means_the_approximation_when_it_says_gelu(load):
    gemma = {**LLAMA, "architectures": ["GemmaForCausalLM"], "hidden_act": "gelu"}
    model = load(gemma)
    assert (model.activation, model.head_dim, model.embedding_scale) == ("gelu_tanh", 256, 8.0)
    assert model.zero_centered_norm
    assert model.tied_embeddings
    with pytest.raises(ValueError, match="use_bidirectional_attention=True is not supported"):
        load({**gemma, "use_bidirectional_attention": True})


GEMMA2 = {**LLAMA, "architectures": ["Gemma2ForCausalLM"], "sliding_window": 32}
GEMMA3 = {**GEMMA2, "architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 4}


def test_gemma2_limits_and_windows(load):
    gemma = load(GEMMA2)
    assert (gemma.attention_softcap, gemma.logit_softcap) == (50.0, 30.0)
    assert gemma.attention_scale == 1 / 16
    assert [gemma.attention_kind(layer).window for layer in range(2)] == [32, None]
    without = load({**GEMMA2, "attn_logit_softcapping": None, "final_logit_softcapping": None})
    assert (without.attention_softcap, without.logit_softcap) == (None, None)
    with pytest.raises(ValueError, match=r"layer_types must name .* for 2 layers, got"):
        load({**GEMMA2, "layer_types": ["full_attention", "chunked_attention"]})


def test_gemma3_rotates_by_kind_of_layer_in_both_notations(load):
    linear = {"rope_type": "linear", "factor": 8.0}
    old = load(
        {
            **GEMMA3,
            "rope_theta": 5e5,
            "rope_local_base_freq": 2e4,
            "rope_scaling": linear,
            "sliding_window_pattern": 2,
        }
    )
    new = load(
        {
            **GEMMA3,
            "rope_parameters": {
                "full_attention": {**linear, "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            },
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        }
    )
    assert old.layer_attention == new.layer_attention
    scaled = Rope(theta=5e5, scaling=RopeScaling(kind="linear", factor=8.0))
    assert old.attention_kind(1) == AttentionKind(rope=scaled, window=None)
    assert old.attention_kind(2) == AttentionKind(rope=Rope(theta=2e4), window=32)
    assert (old.attention_softcap, old.logit_softcap, old.qk_norm) == (None, None, "head")


def test_only_olmo3_layers_without_a_window_stretch_their_rotation(load):
    olmo = {**LLAMA, "architectures": ["Olmo3ForCausalLM"], "num_hidden_layers": 4}
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
    old = load({**olmo, "sliding_window": 16, "rope_theta": 5e5, "rope_scaling": yarn})
    new = load(
        {
            **olmo,
            "sliding_window": 16,
            "rope_parameters": {
                "full_attention": {**yarn, "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
            },
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        }
    )
    assert old.layer_attention == new.layer_attention
    assert old.attention_kind(2) == AttentionKind(rope=Rope(theta=5e5), window=16)
    full = old.attention_kind(3)
    assert full.window is None
    assert full.rope is not None
    assert full.rope.scaling is not None
    assert full.rope.scaling.kind == "yarn"


def test_opt_skips_the_unused_positions(load):
    opt = load(OPT)
    assert opt.positions == LearnedPositions(first_row=2)
    assert opt.linear_bias
    assert opt.tied_embeddings


@pytest.mark.parametrize(
    ("settings", "block"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 64]}, (128, 64)),
        ({"quant_method": "fp8", "activation_scheme": "static"}, None),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "group_0": {
                        "weights": {"type": "float", "num_bits": 8, "block_structure": "128x64"}
                    }
                },
            },
            (128, 64),
        ),
    ],
)
def test_quantized_checkpoints(load, settings, block):
    assert load({**LLAMA, "quantization_config": settings}).weight_block == block
