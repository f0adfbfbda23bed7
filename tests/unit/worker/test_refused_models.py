"""The size of the pool, and models that are refused for it or for their files."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from generation import generate
from runners import BLOCK_SIZE, GREEDY, MAX_TOKENS, open_runner
from tiny_models import greedy, prompts

from fastserve_mega.system.config import Config, KvCacheConfig, ModelConfig, ParallelConfig
from fastserve_mega.worker.megatron import megatron_runner
from fastserve_mega.worker.megatron.megatron_runner import MegatronRunner
from fastserve_mega.worker.topology import Topology


def test_automatic_precision_and_pool_size(made):
    directory, _ = made("llama")
    config = Config(
        model=ModelConfig(path=str(directory)),
        parallel=ParallelConfig(device="cpu", threads_per_rank=1),
        kv_cache=KvCacheConfig(block_size=BLOCK_SIZE, device_memory_gb=0.001),
    )
    runner = MegatronRunner(config, Topology(), "", 0)
    assert runner.cache.pool.nbytes <= 0.001 * 2**30 < runner.cache.pool.nbytes * 1.01
    (output,) = generate(runner, [[5, 6, 7]], GREEDY, block_size=BLOCK_SIZE)
    assert len(output) == MAX_TOKENS
    runner.close()


def test_the_largest_steps_can_be_tried_before_the_pool_is_made(made, monkeypatch):
    """As on a GPU, to see what memory they take."""
    measured = []

    def measure(device, run):
        run()
        measured.append(device)
        return 0

    monkeypatch.setattr(megatron_runner, "is_sized_by_memory", lambda settings, device: True)
    monkeypatch.setattr(megatron_runner, "measure_activations", measure)
    with open_runner(made("llama")[0], cpu_engine="torch") as runner:
        assert measured == [torch.device("cpu")]
        assert runner.device_blocks == 80


def test_a_pool_that_holds_no_block_is_refused(made):
    config = Config(
        model=ModelConfig(path=str(made("llama")[0])),
        parallel=ParallelConfig(device="cpu", threads_per_rank=1),
        kv_cache=KvCacheConfig(device_memory_gb=1e-9),
    )
    with pytest.raises(ValueError, match="device_memory_gb=1e-09 is too little"):
        MegatronRunner(config, Topology(), "", 0)
    assert not torch.distributed.is_initialized()


def test_more_memory_than_the_host_has_is_refused_before_it_is_taken(made):
    config = Config(
        model=ModelConfig(path=str(made("llama")[0])),
        parallel=ParallelConfig(device="cpu"),
        kv_cache=KvCacheConfig(device_memory_gb=100_000.0, host_blocks=0),
    )
    with pytest.raises(ValueError, match=r"GB of memory left, but 1000\d\d\.\d\d GB are needed"):
        MegatronRunner(config, Topology(), "", 0)
    assert not torch.distributed.is_initialized()


def test_a_context_beyond_the_models_is_refused(made):
    config = Config(model=ModelConfig(path=str(made("llama")[0]), max_context=129))
    with pytest.raises(ValueError, match="max_context=129 exceeds the 128 tokens"):
        MegatronRunner(config, Topology(), "", 0)


@pytest.fixture
def broken(made, tmp_path):
    """A copy of a model directory, to be damaged."""
    directory = tmp_path / "model"
    shutil.copytree(made("llama")[0], directory)
    return directory


def assert_refused(directory, message):
    with pytest.raises(ValueError, match=message), open_runner(directory):
        pass
    assert not torch.distributed.is_initialized()


def test_truncated_weights_are_refused(broken):
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_refused(broken, r"model.safetensors is cut short: 100 of its \d+ bytes are missing")
    weights.write_bytes(b"")
    assert_refused(broken, "not a safetensors file")


def test_missing_weights_are_refused(broken):
    (broken / "model.safetensors").unlink()
    assert_refused(broken, "holds no weights")
    index = broken / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    assert_refused(broken, "2 of the files named .* are missing, the first is one.safetensors")
    index.write_text("[]")
    assert_refused(broken, "not a valid index")


def test_a_link_to_nothing_is_told(broken):
    """As an interrupted download leaves it in the hub's cache."""
    weights = broken / "model.safetensors"
    weights.unlink()
    weights.symlink_to(broken / "blobs" / "0123")
    assert_refused(broken, r"model\.safetensors is a link to a file that is not there; fetch")


def test_sharded_weights_are_found_through_the_index(made, tmp_path):
    _, model = made("llama")
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    expected = greedy(model, prompts()[0], MAX_TOKENS)
    with open_runner(tmp_path) as runner:
        assert generate(runner, prompts()[:1], GREEDY, block_size=BLOCK_SIZE) == [expected]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 4}, r"has no tensor model\.layers\.3"),
        ({"intermediate_size": 40}, r"gate_proj.weight has shape \(48, 32\), .* \(40, 32\)"),
        ({"hidden_size": 64, "head_dim": 8}, "has shape"),
        ({"num_attention_heads": 8, "head_dim": 8}, "has shape"),
        ({"vocab_size": 400}, r"embed_tokens.weight has shape \(131, 32\), .* \(400, 32\)"),
    ],
)
def test_weights_that_do_not_fit_the_configuration_are_refused(broken, change, message):
    path = broken / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert_refused(broken, message)
