"""A checkpoint that is not what its config.json says."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from generation import generate
from runners import BLOCK_SIZE, GREEDY, MAX_TOKENS, open_runner
from safetensors.torch import load_file, save_file
from tiny_models import greedy, make_model, prompts

from fastserve_mega.models.architecture import load_architecture
from fastserve_mega.system.config import ParallelConfig
from fastserve_mega.system.partition import partition_model
from fastserve_mega.worker.megatron.checkpoint import (
    architecture_as_stored,
    open_checkpoint,
)
from fastserve_mega.worker.megatron.convert import convert

TABLE = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tied")
    make_model("llama-one-kv-head", directory)
    return directory


@pytest.fixture
def directory(tied, tmp_path):
    for path in tied.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def change(directory, **tensors):
    path = directory / "model.safetensors"
    save_file({**load_file(path), **tensors}, path)


def described(directory, **values):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def warnings_of(directory, caplog):
    """What is said while the checkpoint is opened."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        architecture = architecture_as_stored(directory, load_architecture(directory))
        open_checkpoint(
            directory, architecture, partition_model(architecture, ParallelConfig(), 0, 1)
        )
    return [record.getMessage() for record in caplog.records]


def test_an_output_layer_of_its_own_is_used_whatever_config_json_says(directory, caplog):
    assert architecture_as_stored(directory, load_architecture(directory)).tied_embeddings
    table = load_file(directory / "model.safetensors")[TABLE]
    change(directory, **{"lm_head.weight": table.clone()})
    assert architecture_as_stored(directory, load_architecture(directory)).tied_embeddings
    assert warnings_of(directory, caplog) == []
    table[-1, -1] += 1
    change(directory, **{"lm_head.weight": table})
    (warning,) = warnings_of(directory, caplog)
    assert "tie_word_embeddings, but the checkpoint's lm_head.weight is not" in warning
    assert not architecture_as_stored(directory, load_architecture(directory)).tied_embeddings


def test_a_conversion_does_not_lose_an_output_layer(directory, tmp_path_factory):
    change(directory, **{"lm_head.weight": torch.zeros(131, 32)})
    target = tmp_path_factory.mktemp("out")
    with pytest.raises(ValueError, match='write "tie_word_embeddings": false'):
        convert(directory, target, "torch_dist")


def test_tensors_that_are_not_used_are_told_but_for_constants(directory, caplog):
    assert warnings_of(directory, caplog) == []
    layer = "model.layers.0.self_attn"
    change(directory, **{f"{layer}.rotary_emb.inv_freq": torch.ones(4)})
    assert warnings_of(directory, caplog) == []
    change(directory, **{f"{layer}.q_proj.bias": torch.ones(32)})
    (warning,) = warnings_of(directory, caplog)
    assert f"1 tensors of {directory} are not used, the first is {layer}.q_proj.bias" in warning
    described(directory, num_hidden_layers=2)
    (warning,) = warnings_of(directory, caplog)
    assert "the first is model.layers.0.self_attn.q_proj.bias" in warning


def test_every_family_uses_all_of_its_tensors(tmp_path, caplog):
    for name in ("gpt2", "opt"):
        make_model(name, tmp_path / name)
        assert warnings_of(tmp_path / name, caplog) == []


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_model_that_sees_images_is_served(made, tmp_path, caplog, prefix):
    """As Gemma 3 4B is stored: by transformers 4 and on the hub, and by transformers 5."""
    directory, model = made("gemma3")
    text = json.loads((directory / "config.json").read_text())
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 106]}
    (tmp_path / "config.json").write_text(json.dumps({**config, "text_config": text}))
    tensors = load_file(directory / "model.safetensors")
    wrapped = {name.replace("model.", prefix, 1): tensor for name, tensor in tensors.items()}
    wrapped["vision_tower.vision_model.head.weight"] = torch.ones(2)
    save_file(wrapped, tmp_path / "model.safetensors")
    with open_runner(tmp_path) as runner:
        assert generate(runner, prompts()[:1], GREEDY, block_size=BLOCK_SIZE) == [
            greedy(model, prompts()[0], MAX_TOKENS)
        ]
        assert runner.architecture.eos_token_ids == (1, 106, 2)
    assert "not used" not in caplog.text
