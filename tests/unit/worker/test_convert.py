"""Hugging Face → torch_dist → Hugging Face, and the tokens of what lies between."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import MODELS, make_model

from fastserve_mega.worker.megatron.convert import convert


def tensors_of(directory):
    found = {}
    for path in directory.glob("*.safetensors"):
        found |= load_file(path)
    return found


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Family → (original, Megatron's, back again), made when first asked for."""
    made = {}

    def get(name):
        if name not in made:
            base = tmp_path_factory.mktemp(name)
            make_model(name, base / "original")
            (base / "original" / "tokenizer.json").write_text("{}")
            convert(base / "original", base / "megatron", "torch_dist")
            convert(base / "megatron", base / "back", "huggingface")
            made[name] = (base / "original", base / "megatron", base / "back")
        return made[name]

    return get


@pytest.mark.parametrize("name", list(MODELS))
def test_there_and_back_is_bit_equal(converted, name):
    original, _, back = converted(name)
    before, after = tensors_of(original), tensors_of(back)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype
        assert torch.equal(tensor, after[key]), key
