"""Whose layers: what is installed, what the device can use, and the same tokens with each."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from tiny_models import greedy, make_model, prompts

from fastserve_mega.models.architecture import load_architecture
from fastserve_mega.system.config import ParallelConfig
from fastserve_mega.system.partition import partition_model
from fastserve_mega.worker.megatron import layer_spec
from fastserve_mega.worker.megatron.layer_spec import choose_layers, log_choice

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TESTS = Path(__file__).parent.parent.parent
JOBS = {
    "qwen2": "transformer_engine",
    "gpt2": "transformer_engine",
    "qwen3-moe": "auto",
    "gemma3": "auto",
    "opt": "local",
}
MAX_TOKENS = 8


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Family → (directory, expected tokens of two prompts)."""
    directories = {}
    for family in JOBS:
        directory = tmp_path_factory.mktemp(family)
        model = make_model(family, directory)
        expected = [greedy(model, prompt, MAX_TOKENS) for prompt in prompts()[:2]]
        directories[family] = (directory, expected)
    return directories


@pytest.fixture(scope="module")
def with_stand_ins(made):
    """Results of all jobs, from one process that imports the stand-ins as the real packages."""
    jobs = {
        family: {
            "model": str(made[family][0]),
            "layer_spec": setting,
            "prompts": prompts()[:2],
            "max_tokens": MAX_TOKENS,
        }
        for family, setting in JOBS.items()
    }
    stand_ins = TESTS / "stand_ins"
    path = os.pathsep.join(map(str, (stand_ins, TESTS, TESTS.parent)))
    done = subprocess.run(
        [sys.executable, str(stand_ins / "run_layers.py")],
        input=json.dumps(jobs),
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("family", JOBS)
def test_the_tokens_do_not_depend_on_whose_layers(with_stand_ins, made, family):
    assert with_stand_ins[family]["tokens"] == made[family][1]


def test_transformer_engines_layers_are_what_megatron_makes_of_them(with_stand_ins):
    for family in ("qwen2", "gpt2", "gemma3"):
        classes = with_stand_ins[family]["classes"]
        assert {"TELayerNormColumnParallelLinear", "TERowParallelLinear"} <= set(classes)
        assert not {"ColumnLinear", "RowLinear"} & set(classes)
    mixture = set(with_stand_ins["qwen3-moe"]["classes"])
    assert {"TERowParallelLinear", "TopKRouter", "SequentialMLP", "PartialRowLinear"} <= mixture


def test_apex_norms_are_used_by_megatrons_own_layers(with_stand_ins):
    assert "FusedLayerNorm" in with_stand_ins["opt"]["classes"]
    assert with_stand_ins["opt"]["fused_norms"] > 0
    assert with_stand_ins["gpt2"]["fused_norms"] == 0


@pytest.fixture
def opt(made):
    return load_architecture(made["opt"][0])


def test_a_cpu_takes_megatrons_own_and_says_why(opt, caplog):
    caplog.set_level(logging.INFO)
    log_choice(choose_layers("auto", opt, CPU))
    assert "layers: Megatron's own (Transformer Engine needs a CUDA device)" in caplog.text
    choice = choose_layers("local", opt, CPU)
    assert (choice.linears, choice.reason) == ("local", "model.layer_spec=local")


def test_transformer_engine_asked_for_and_not_usable_is_refused(opt, monkeypatch):
    message = "model.layer_spec=transformer_engine, but Transformer Engine needs a CUDA device"
    with pytest.raises(ValueError, match=message):
        choose_layers("transformer_engine", opt, CPU)
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    message = "but Transformer Engine cannot be imported: .*transformer_engine"
    with pytest.raises(ValueError, match=message):
        choose_layers("transformer_engine", opt, GPU)
    assert choose_layers("auto", opt, GPU).linears == "local"


@pytest.mark.skipif(
    importlib.util.find_spec("apex") is not None, reason="a package apex is installed"
)
def test_the_apex_of_pypi_is_named_and_not_used(opt, monkeypatch, caplog):
    without = choose_layers("local", opt, GPU)
    assert not without.fused_norm
    assert not without.unrelated_apex
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    choice = choose_layers("local", opt, GPU)
    assert choice.unrelated_apex
    assert not choice.fused_norm
    log_choice(choice)
    assert "the package apex that is installed is not NVIDIA Apex" in caplog.text
    monkeypatch.setitem(sys.modules, "apex.normalization", types.ModuleType("normalization"))
    assert choose_layers("local", opt, GPU).fused_norm
    assert not choose_layers("local", opt, CPU).fused_norm


def test_megatron_itself_would_take_any_apex_for_nvidias(opt, monkeypatch):
    """It would refuse to build the norm; so the specification names the norm to use."""
    from megatron.core.models import backends

    monkeypatch.setattr(backends, "LNImpl", layer_spec.FusedLayerNorm)
    choice = choose_layers("auto", opt, CPU)
    partition = partition_model(opt, ParallelConfig(), 0, 1)
    spec = layer_spec.block_spec(opt, partition, choice)
    norms = {spec.layer_norm}
    for layer in spec.layer_specs:
        norms |= {layer.submodules.input_layernorm, layer.submodules.pre_mlp_layernorm}
    assert norms == {layer_spec.WrappedTorchNorm}
