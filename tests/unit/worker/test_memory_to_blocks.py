"""Memory to blocks, without a device."""

import dataclasses
import json

import pytest
import torch

from fastserve_mega.models.architecture import Experts, load_architecture
from fastserve_mega.system import sizes
from fastserve_mega.system.config import Config, KvCacheConfig, ModelConfig, SwapConfig
from fastserve_mega.worker import memory
from fastserve_mega.worker.trial_steps import largest_steps, varied_steps

GB = 2**30
BLOCK_BYTES = 2**20
CUDA = torch.device("cuda")


@pytest.fixture
def architecture(tmp_path):
    described = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_attention_heads": 2,
        "num_hidden_layers": 2, "intermediate_size": 16, "vocab_size": 350,
        "max_position_embeddings": 512,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(described))
    return load_architecture(tmp_path)


def config(directory="x", **settings):
    return Config(model=ModelConfig(path=str(directory)), kv_cache=KvCacheConfig(**settings))


def test_utilization_leaves_what_others_and_activations_take():
    settings = KvCacheConfig(device_memory_utilization=0.75)
    assert sizes.free_for_blocks(settings, 60 * GB, 80 * GB, 3 * GB) == 37 * GB
    assert sizes.free_for_blocks(settings, 10 * GB, 80 * GB, 3 * GB) == 0


def test_cuda_takes_its_share_of_what_the_weights_left(monkeypatch, architecture):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * GB, 80 * GB))
    wanted = config(device_memory_utilization=0.75)
    activations = sizes.activation_bytes(wanted, architecture)
    assert 0 < activations < GB
    blocks = memory.device_blocks(wanted, architecture, BLOCK_BYTES, CUDA)
    assert blocks == (40 * GB - activations) // BLOCK_BYTES


def test_what_the_largest_step_was_seen_to_take_counts_more_than_an_estimate(
    monkeypatch, architecture
):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * GB, 80 * GB))
    wanted = config(device_memory_utilization=0.75)
    blocks = memory.device_blocks(wanted, architecture, BLOCK_BYTES, CUDA, 5 * GB)
    assert blocks == 35 * GB // BLOCK_BYTES


def test_the_peak_of_a_computation_is_measured(monkeypatch):
    reserved = {"now": 3 * GB, "peak": 9 * GB}
    calls = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda device: reserved.update(peak=3 * GB)
    )
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: reserved["peak"])
    monkeypatch.setattr(memory, "wait_for", lambda device: calls.append("wait"))

    def compute():
        calls.append("compute")
        reserved["peak"] = 7 * GB

    assert memory.measure_activations(CUDA, compute) == 4 * GB
    assert calls == ["empty", "compute", "wait", "empty"]


def test_the_largest_steps_fill_a_step_and_the_longest_context():
    wanted = config()
    (chunk,), decodes = largest_steps(wanted, 4096)
    assert (chunk.context, len(chunk.token_ids)) == (4096, wanted.scheduler.max_batch_tokens)
    assert len(decodes) == wanted.scheduler.max_batch_size
    assert {len(each.token_ids) for each in decodes} == {1}
    assert {each.context for each in decodes} == {4096}
    assert {each.changes_logits and each.params.logprobs for each in decodes} == {20}
    ((short,), _) = largest_steps(wanted, 100)
    assert (short.context, short.start) == (100, 0)


def test_steps_that_compile_have_each_power_of_two_of_context_beside_a_chunk():
    for longest, count in ((20, 5), (131_072, 14)):
        *steps, (changed,) = varied_steps(config(), longest)
        assert [decode.context for decode, _ in steps] == [2**n for n in range(count)]
        assert {len(chunk.token_ids) for _, chunk in steps} == {17}
        assert changed.changes_logits
    ((_, chunk), _) = varied_steps(config(), 1)
    assert chunk.context == 1


def test_a_rank_may_hold_all_experts_that_a_step_chooses(architecture):
    experts = Experts(count=4, chosen=2, ffn_hidden_size=12, normalized=True)
    mixture = dataclasses.replace(architecture, experts=experts)
    wanted = config()
    more = sizes.activation_bytes(wanted, mixture)
    more -= sizes.activation_bytes(wanted, architecture)
    rows = wanted.scheduler.max_batch_tokens * experts.chosen
    assert more == 4 * rows * (2 * architecture.hidden_size + 3 * experts.ffn_hidden_size)


def test_a_device_full_of_weights_is_refused_with_numbers(monkeypatch, architecture):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7 * GB, 80 * GB))
    expected = (
        "device_memory_utilization=0.9 leaves 0.00 GB of 80.00 beside the weights: two blocks"
    )
    with pytest.raises(ValueError, match=expected):
        memory.device_blocks(config(), architecture, BLOCK_BYTES, CUDA)


@pytest.mark.parametrize(
    ("settings", "device", "expected"),
    [
        ({"device_blocks": 7}, "cuda", 7),
        ({"device_memory_gb": 2.0}, "cuda", 2048),
        ({"device_memory_gb": 2.0}, "cpu", 2048),
        ({}, "cpu", 1024),
    ],
)
def test_given_sizes(architecture, settings, device, expected):
    device = torch.device(device)
    blocks = memory.device_blocks(config(**settings), architecture, BLOCK_BYTES, device)
    assert blocks == expected


def test_only_strategies_that_swap_have_a_host_pool():
    for strategy, expected in (
        ("proactive", 512),
        ("reactive", 512),
        ("recompute", 0),
        ("none", 0),
    ):
        settings = KvCacheConfig(host_memory_gb=0.5, swap=SwapConfig(strategy=strategy))
        assert sizes.host_blocks(settings, BLOCK_BYTES) == expected
