from __future__ import annotations

import json

import pytest

from fastserve_mega.models.architecture import LearnedPositions, Rope, load_architecture

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
}
QWEN = {**LLAMA, "use_sliding_window": False, "sliding_window": 32}
OPT = {
    "architectures": ["OPTForCausalLM"],
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "word_embed_proj_dim": 64,
}


@pytest.fixture
def load(tmp_path):
    def load_config(config, generation=None):
        (tmp_path / "config.json").write_text(json.dumps(config))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return load_architecture(tmp_path)

    return load_config


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


def test_opt_skips_the_unused_positions(load):
    opt = load(OPT)
    assert opt.positions == LearnedPositions(first_row=2)
    assert opt.linear_bias
    assert opt.tied_embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "'MambaForCausalLM' is not supported; .*Llama"),
        ({"architectures": None}, "architecture None is not supported"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size must be a positive whole number, got '64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive whole number, got 0"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 key-value heads"),
        ({"head_dim": 15}, "rotary embedding needs an even head_dim, got 15"),
        ({"hidden_act": "xielu"}, "hidden_act='xielu' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn' is not"),
        ({"rope_scaling": [4.0]}, "rope_scaling must be an object"),
        ({"rms_norm_eps": -1}, "rms_norm_eps must be a positive number, got -1"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, got 'yes'"),
        ({"eos_token_id": "</s>"}, "eos_token_id must hold token ids, got '</s>'"),
        ({"quantization_config": {"bits": 4}}, "quantized checkpoints"),
    ],
)
def test_bad_config_gets_one_sentence(load, change, message):
    with pytest.raises(ValueError, match=message) as error:
        load({**LLAMA, **change})
    assert "config.json" in str(error.value)


def test_variants_that_are_not_computed_are_refused(load):
    with pytest.raises(ValueError, match="do_layer_norm_before=False is not supported"):
        load({**OPT, "do_layer_norm_before": False})
    with pytest.raises(ValueError, match="use_sliding_window=True is not supported"):
        load({**QWEN, "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True})


def test_directories_without_a_readable_config(tmp_path):
    with pytest.raises(ValueError, match=r"is not a model directory: it has no config\.json"):
        load_architecture(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_architecture(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object, got list"):
        load_architecture(tmp_path)
