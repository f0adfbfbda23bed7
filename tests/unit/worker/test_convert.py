"""Hugging Face → torch_dist → Hugging Face, and the tokens of what lies between."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import MODELS, make_model

from fastserve_mega.cli import main
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


def test_config_and_tokenizer_come_along(converted):
    for directory in converted("gpt2"):
        assert (directory / "config.json").is_file()
        assert (directory / "tokenizer.json").is_file()
    original, megatron, back = converted("gpt2")
    assert not list(megatron.glob("*.safetensors"))
    assert (back / "config.json").read_bytes() == (original / "config.json").read_bytes()
    assert not (back / "metadata.json").exists()


def test_transformers_reads_what_comes_back(converted):
    import transformers

    original, _, back = converted("opt")
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="float32").eval()
        for directory in (original, back)
    ]
    logits = [model(torch.tensor([[3, 4, 5]])).logits for model in models]
    assert torch.equal(*logits)


def test_precision_is_kept_and_shards_are_indexed(tmp_path, monkeypatch):
    monkeypatch.setattr("fastserve_mega.worker.megatron.safetensors_files._SHARD_BYTES", 1)
    model = make_model("llama", tmp_path / "float32").bfloat16()
    model.save_pretrained(tmp_path / "original", max_shard_size="20KB")
    convert(tmp_path / "original", tmp_path / "megatron", "torch_dist")
    convert(tmp_path / "megatron", tmp_path / "back", "huggingface")
    before, after = tensors_of(tmp_path / "original"), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(after)
    assert len({*index["weight_map"].values()}) == len(after)


def test_the_command(tmp_path, capsys):
    make_model("llama", tmp_path / "original")
    arguments = ["--from", str(tmp_path / "original"), "--to", str(tmp_path / "new")]
    assert main(["convert", *arguments, "--format", "torch_dist"]) == 0
    assert (tmp_path / "new" / "metadata.json").is_file()
    assert main(["convert", *arguments, "--format", "torch_dist"]) == 2
    assert "new exists and is not an empty directory" in capsys.readouterr().err
    (tmp_path / "original" / "config.json").unlink()
    assert main(["convert", *arguments, "--format", "torch_dist"]) == 2
    assert "has no config.json" in capsys.readouterr().err
