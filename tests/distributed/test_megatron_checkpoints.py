"""Megatron's distributed checkpoints: saved by some ranks, loaded by others."""

from __future__ import annotations

import shutil

import pytest
from generation import generate
from test_parity import LAYOUTS, MAX_TOKENS, job, mpirun
from tiny_models import greedy, make_model, prompts

from fastserve_mega.system.config import Config, KvCacheConfig, ModelConfig, ParallelConfig
from fastserve_mega.types import SamplingParams
from fastserve_mega.worker.megatron.convert import convert
from fastserve_mega.worker.megatron.megatron_runner import MegatronRunner
from fastserve_mega.worker.topology import Topology

pytestmark = pytest.mark.distributed

TWO_RANKS = ("tensor-2", "pipeline-2-uneven")
FAMILIES = ("llama", "llama-one-kv-head", "qwen3", "opt", "gpt2", "qwen2-moe")
"""One of each kind: plain, heads shared and tied, more norms, positions, transposed, experts."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Family → (Megatron's directory, saved as one rank would, and the expected tokens)."""
    made = {}
    for name in FAMILIES:
        base = tmp_path_factory.mktemp(name)
        model = make_model(name, base / "huggingface")
        convert(base / "huggingface", base / "megatron", "torch_dist")
        made[name] = (
            base / "megatron",
            [greedy(model, prompt, MAX_TOKENS) for prompt in prompts()],
        )
    return made


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tmp_path_factory.mktemp("saved-by-four-ranks")


@pytest.fixture(scope="module")
def outputs(models, saved, tmp_path_factory):
    jobs = {
        f"{layout}/{name}": job(models[name][0], LAYOUTS[layout])
        for layout in TWO_RANKS
        for name in models
    }
    mixture = job(models["qwen2-moe"][0], LAYOUTS["expert-2"], save_to=str(saved / "qwen2-moe"))
    jobs["expert-2/qwen2-moe"] = mixture
    four = LAYOUTS["tensor-2-pipeline-2"]
    # One key-value head on two ranks is loaded, but cannot be saved.
    jobs_of_four = {
        f"four/{name}": job(models[name][0], four, save_to=str(saved / name))
        for name in ("llama", "opt", "gpt2")
    }
    jobs_of_four["four/llama-one-kv-head"] = job(models["llama-one-kv-head"][0], four)
    return {
        **mpirun(2, jobs, tmp_path_factory.mktemp("two-ranks")),
        **mpirun(4, jobs_of_four, tmp_path_factory.mktemp("four-ranks")),
    }


def run_alone(directory):
    config = Config(
        model=ModelConfig(path=str(directory), dtype="float32"),
        parallel=ParallelConfig(device="cpu", threads_per_rank=1),
        kv_cache=KvCacheConfig(block_size=4, device_blocks=80),
    )
    runner = MegatronRunner(config, Topology(), "", 0)
    try:
        params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
        return generate(runner, prompts(), params, block_size=4, chunk=7)
    finally:
        runner.close()


@pytest.mark.parametrize("name", FAMILIES)
def test_saved_by_one_rank_served_by_one(models, name):
    assert run_alone(models[name][0]) == models[name][1]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("layout", TWO_RANKS)
def test_saved_by_one_rank_served_by_two(outputs, models, layout, name):
    assert outputs[f"{layout}/{name}"] == models[name][1]


def test_whole_experts_are_divided_and_saved(outputs, models, saved):
    directory, expected = models["qwen2-moe"]
    assert outputs["expert-2/qwen2-moe"] == expected
    shutil.copy(directory / "config.json", saved / "qwen2-moe")
    assert run_alone(saved / "qwen2-moe") == expected


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "llama-one-kv-head"])
def test_saved_by_one_rank_served_by_four(outputs, models, name):
    assert outputs[f"four/{name}"] == models[name][1]


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_saved_by_four_ranks_served_by_one(outputs, models, saved, name):
    assert f"four/{name}" in outputs
    shutil.copy(models[name][0] / "config.json", saved / name)
    assert run_alone(saved / name) == models[name][1]
