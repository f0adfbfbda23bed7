"""What a config.json may not say, and the one sentence that is said of it."""

import pytest
from model_configs import LLAMA, OPT, QWEN

from fastserve_mega.models.architecture import load_architecture


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
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported, only 1.0"),
        ({"rope_scaling": {"type": "su", "short_factor": 2}}, "short_factor must be a list of"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
            "longrope needs a factor for each of 8 pairs, got 1",
        ),
        ({"hidden_act": "xielu"}, "hidden_act='xielu' is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type='dynamic' is not"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"factor": 4.0}}, "a rope factor of 4.0 needs a rope_type"),
        ({"rope_scaling": [4.0]}, "rope_scaling must be an object"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "sliding_attention for layer 1, which .* computes with full_attention",
        ),
        ({"layer_types": ["full_attention"] * 9}, "layer_types names 9 layers of 2"),
        ({"rms_norm_eps": -1}, "rms_norm_eps must be a positive number, got -1"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, got 'yes'"),
        ({"eos_token_id": "</s>"}, "eos_token_id must hold token ids, got '</s>'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method is 'gptq'; supported"),
        ({"quantization_config": 8}, "quant_method is None"),
        ({"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}}, "fmt is 'e5m2'"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}},
            r"a block must have two sizes, got \[128\]",
        ),
        (
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "config_groups": {"group_0": {"weights": {"type": "int", "num_bits": 4}}},
                }
            },
            "weights of type 'int' with 4 bits",
        ),
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


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("adapter_config.json", "it has an adapter, to be merged into its base model first"),
        ("model-Q4_K_M.gguf", "no config.json, but model-Q4_K_M.gguf, which is not supported"),
    ],
)
def test_what_is_there_in_place_of_a_model_is_told(tmp_path, file, message):
    (tmp_path / file).write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=message):
        load_architecture(tmp_path)
    with pytest.raises(ValueError, match="is not a model directory: it is a file"):
        load_architecture(tmp_path / file)


def test_a_wrong_end_token_is_told_with_its_file(load):
    with pytest.raises(ValueError, match=r"/generation_config\.json: eos_token_id .* got '2'"):
        load(LLAMA, {"eos_token_id": "2"})
    with pytest.raises(ValueError, match=r"/config\.json: eos_token_id .* got -1"):
        load({**LLAMA, "eos_token_id": -1}, {"eos_token_id": 2})


def test_directories_without_a_readable_config(tmp_path):
    with pytest.raises(ValueError, match=r"is not a model directory: it has no config\.json"):
        load_architecture(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_architecture(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object, got list"):
        load_architecture(tmp_path)
