"""Rotary frequencies and their scaling, against transformers."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fastserve_mega.models.architecture import Rope, RopeScaling, load_architecture
from fastserve_mega.worker.megatron.rotation import Rotation, rotary_frequencies

QWEN = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 100,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "scaling",
    [
        YARN,
        {**YARN, "truncate": False},
        {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
        {**YARN, "attention_factor": 1.25},
        {**YARN, "mscale": 1.0, "mscale_all_dim": 0.707},
        {**YARN, "factor": 1.0},
        {"rope_type": "linear", "factor": 3.0},
        LLAMA3,
    ],
)
def test_scaled_frequencies_equal_transformers(tmp_path, scaling):
    (tmp_path / "config.json").write_text(json.dumps({**QWEN, "rope_scaling": scaling}))
    rope = load_architecture(tmp_path).positions
    assert isinstance(rope, Rope)
    config = transformers.Qwen3Config(**QWEN, rope_scaling=dict(scaling))
    expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config)
    torch.testing.assert_close(rotary_frequencies(rope, 128), expected)
    assert rope.scaling is not None
    assert rope.scaling.attention_factor == pytest.approx(factor)


def test_yarn_lengthens_the_context_of_a_config_that_keeps_the_old_limit(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**QWEN, "rope_scaling": YARN}))
    assert load_architecture(tmp_path).max_context == 4 * 32768


def test_the_attention_factor_lengthens_cosines_and_sines(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({**QWEN, "rope_scaling": {**YARN, "attention_factor": 1.25}})
    )
    rope = load_architecture(tmp_path).positions
    cosine, sine = Rotation(rope, 128, torch.device("cpu")).at(torch.arange(3), torch.float32)
    assert cosine.shape == (3, 1, 1, 128)
    torch.testing.assert_close(cosine**2 + sine**2, torch.full_like(cosine, 1.25**2))


def test_a_scaling_beside_rope_parameters_comes_first_as_in_transformers(tmp_path):
    def read(**changes):
        (tmp_path / "config.json").write_text(json.dumps({**QWEN, **changes}))
        return load_architecture(tmp_path).positions

    written = {"rope_type": "default", "rope_theta": 5e5}
    for name in ("type", "rope_type"):
        scaling = {name: "linear", "factor": 2.0}
        config = transformers.Qwen3Config(
            **QWEN, rope_parameters=dict(written), rope_scaling=dict(scaling)
        )
        assert config.rope_parameters["factor"] == 2.0
        rope = read(rope_parameters=written, rope_scaling=scaling)
        assert rope == Rope(theta=5e5, scaling=RopeScaling(kind="linear", factor=2.0))
    for nothing in (None, {}):
        assert read(rope_parameters=written, rope_scaling=nothing) == Rope(theta=5e5)


@pytest.mark.parametrize(("context", "factors"), [(4096, "short"), (4097, "long"), (None, "long")])
def test_longrope_takes_the_factors_of_the_context_that_is_served(tmp_path, context, factors):
    """As Phi-4-mini has it, whose heads are rotated in part."""
    phi = {
        **QWEN,
        "architectures": ["Phi3ForCausalLM"],
        "head_dim": None,
        "pad_token_id": 0,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 4096,
    }
    scaling = {
        "type": "longrope",
        "short_factor": [1.0 + 0.01 * pair for pair in range(48)],
        "long_factor": [1.0 + 0.5 * pair for pair in range(48)],
    }
    (tmp_path / "config.json").write_text(json.dumps({**phi, "rope_scaling": scaling}))
    rope = load_architecture(tmp_path, context).positions
    assert isinstance(rope, Rope)
    assert rope.size == 96
    del phi["head_dim"]
    config = transformers.Phi3Config(**phi, rope_scaling=dict(scaling))
    length = {"short": 4096, "long": 4097}[factors]
    expected, factor = ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=length)
    torch.testing.assert_close(rotary_frequencies(rope, 128), expected)
    assert rope.scaling is not None
    assert rope.scaling.attention_factor == pytest.approx(factor)
