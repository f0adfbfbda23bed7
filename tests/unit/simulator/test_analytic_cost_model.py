from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fastserve_mega.models.architecture import Architecture, Experts, LearnedPositions
from fastserve_mega.models.opt import WEIGHTS
from fastserve_mega.plan import SequenceSlice
from fastserve_mega.simulator.analytic_cost_model import AnalyticCostModel
from fastserve_mega.simulator.engine_model import StepWork, step_work
from fastserve_mega.system.config import (
    Config,
    KvCacheConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
)
from fastserve_mega.system.deployment import plan_deployment
from fastserve_mega.system.hardware import Device, HardwareConfig, Link
from fastserve_mega.types import RequestId

MEMORY = 1e9
FLOPS = 1e9
ATTENTION = 4 * 16 * 16
MODEL = Architecture(
    name="OPTForCausalLM", num_layers=2, hidden_size=16, num_heads=2, num_kv_heads=2, head_dim=8,
    ffn_hidden_size=64, vocab_size=100, max_context=2048, norm="layer", norm_epsilon=1e-5,
    activation="relu", gated=False, positions=LearnedPositions(), tied_embeddings=True,
    weights=WEIGHTS,
)  # fmt: skip
DEVICE = Device(
    name="toy", memory_bytes=10**6, memory_bandwidth=MEMORY, peak_flops=FLOPS,
    host_bandwidth=1e6, memory_efficiency=1.0, compute_efficiency=1.0, host_efficiency=1.0,
)  # fmt: skip


def toy(
    model: Architecture = MODEL,
    *,
    devices_per_node: int = 8,
    replica: int = 0,
    layer_overhead_s: float = 0.0,
    step_overhead_s: float = 0.0,
    **mesh: Any,
) -> AnalyticCostModel:
    """1 GB/s and 1 GFLOP/s; a model of two layers of 3,072 parameters each."""
    config = Config(
        model=ModelConfig(path="toy", dtype="float16"),
        parallel=ParallelConfig(**mesh),
        kv_cache=KvCacheConfig(device_blocks=100),
        scheduler=SchedulerConfig(max_batch_tokens=8),
        hardware=HardwareConfig(
            device=DEVICE,
            devices_per_node=devices_per_node,
            interconnect=Link(name="fast", bandwidth=1e6, latency_s=1e-6),
            network=Link(name="slow", bandwidth=1e5, latency_s=1e-5),
            layer_overhead_s=layer_overhead_s,
            step_overhead_s=step_overhead_s,
        ),
    )
    return AnalyticCostModel(config, plan_deployment(config, model), replica)


def piece(start: int, num_tokens: int, *, samples: bool = True) -> SequenceSlice:
    return SequenceSlice(RequestId("r"), start, num_tokens, samples, 0, ())


def test_step_work_adds_up_decodes_and_prefills_apart() -> None:
    work = step_work([piece(9, 1), piece(0, 4), piece(4, 3, samples=False)])
    # pairs: 1+2+3+4 of the first prefill, 5+6+7 of the second
    assert work == StepWork(8, 2, 1, 10, 4 + 7, 10 + 18, earlier_pairs=3 * 4)


def test_decode_is_weights_head_and_kv_read_once() -> None:
    layer_parameters = 4 * 16 * 16 + 2 * 16 * 64
    weights_s = 2 * 2 * layer_parameters / MEMORY
    head_s = 2 * 16 * 100 / MEMORY
    kv_s = 2 * 2 * 16 * 2 / MEMORY  # keys and values of 2 layers, 2 bytes
    assert toy().decode_s(1, 9) == pytest.approx(weights_s + head_s + 10 * kv_s)


def test_prefill_beyond_the_roofline_is_bound_by_compute() -> None:
    layer_parameters = 4 * 16 * 16 + 2 * 16 * 64
    linear_s = 2 * 2 * layer_parameters * 4 / FLOPS
    pairs_s = 4 * 2 * 16 * (1 + 2 + 3 + 4) / FLOPS
    head_s = 2 * 16 * 100 / FLOPS
    assert toy().prefill_s(4) == pytest.approx(linear_s + pairs_s + head_s)


def test_prefill_of_a_long_prompt_is_the_sum_of_its_chunks() -> None:
    model = toy()
    chunks = [step_work([piece(0, 8, samples=False)]), step_work([piece(8, 3)])]
    assert model.prefill_s(11) == pytest.approx(sum(map(model.step_s, chunks)))


def test_decode_s_is_the_time_of_such_a_step() -> None:
    model = toy(tensor=2, pipeline=2, step_overhead_s=1e-3, layer_overhead_s=1e-4)
    work = step_work([piece(50, 1)] * 3)
    assert model.decode_s(3, 50) == pytest.approx(model.step_s(work))


def test_tensor_ranks_share_the_work_and_pay_for_all_reduces() -> None:
    alone, pair = toy(), toy(tensor=2)
    # two layers, two all-reduces each, of 16 values of 2 bytes: half is sent twice
    all_reduces_s = 4 * (1e-6 + 32 / 1e6)
    assert pair.decode_s(1, 9) == pytest.approx(alone.decode_s(1, 9) / 2 + all_reduces_s)


def test_tensor_ranks_on_two_nodes_use_the_network() -> None:
    near, far = toy(tensor=2), toy(tensor=2, devices_per_node=1)
    slower_s = 4 * (1e-5 + 32 / 1e5) - 4 * (1e-6 + 32 / 1e6)
    assert far.decode_s(1, 9) - near.decode_s(1, 9) == pytest.approx(slower_s)


def test_stages_share_the_layers_and_the_last_has_the_head() -> None:
    whole, staged = toy(), toy(pipeline=2)
    work = step_work([piece(9, 1)])
    first_s, last_s = staged.stage_times(work)
    assert first_s + last_s == pytest.approx(whole.stage_times(work)[0])
    assert last_s - first_s == pytest.approx(2 * 16 * 100 / MEMORY)
    assert staged.hop_times(3) == [pytest.approx(1e-6 + 3 * 32 / 1e6), 0.0]


def test_copies_move_the_shards_of_all_ranks_at_once() -> None:
    assert toy().copy_s(3, block_size=16) == pytest.approx(3 * 2 * 2 * 16 * 2 * 16 / 1e6)
    assert toy(tensor=2).copy_s(3, 16) == pytest.approx(toy().copy_s(3, 16) / 2)


def test_stages_may_be_uneven() -> None:
    model = replace(MODEL, num_layers=3)
    first_s, last_s = toy(model, pipeline=2, layers_per_stage=(1, 2)).stage_times(
        step_work([piece(9, 1)])
    )
    assert last_s - 2 * 16 * 100 / MEMORY == pytest.approx(2 * first_s)
    # All ranks copy their shards at once: the one with two layers takes longest.
    uneven = toy(model, pipeline=2, layers_per_stage=(1, 2))
    assert uneven.copy_s(1, 16) == pytest.approx(toy().copy_s(1, 16))


def test_a_replica_on_two_nodes_is_slower_than_one_on_a_node() -> None:
    inside, across = (
        toy(tensor=2, data=2, devices_per_node=3, replica=replica) for replica in range(2)
    )
    assert across.decode_s(1, 9) > inside.decode_s(1, 9)


MIXTURE = replace(
    MODEL, experts=Experts(count=4, chosen=1, ffn_hidden_size=32, normalized=True)
)  # fmt: skip
ONE_EXPERT = 3 * 16 * 32
ROUTER = 16 * 4


def test_a_decode_of_a_mixture_reads_the_experts_that_its_tokens_choose() -> None:
    head_s = 2 * 16 * 100 / MEMORY
    kv_s = 2 * 2 * 16 * 2 / MEMORY
    model = toy(MIXTURE)
    for tokens, experts in ((1, 1.0), (2, 1.75), (100, 4.0)):
        read = 2 * 2 * (ATTENTION + ROUTER + experts * ONE_EXPERT) / MEMORY
        linear = 2 * 2 * (ATTENTION + ROUTER + ONE_EXPERT) * tokens / FLOPS
        expected_s = max(read, linear) + tokens * 10 * kv_s + max(head_s, head_s * tokens)
        assert model.decode_s(tokens, 9) == pytest.approx(expected_s)


def test_expert_parallel_ranks_share_the_reading() -> None:
    one = toy(MIXTURE, tensor=2, expert=1)
    assert toy(MIXTURE, tensor=2, expert=2).decode_s(1, 9) == pytest.approx(one.decode_s(1, 9))


def test_without_a_device_it_takes_a_profile() -> None:
    config = Config(model=ModelConfig(path="toy"), kv_cache=KvCacheConfig(device_blocks=100))
    with pytest.raises(ValueError, match=r"hardware\.device is not given"):
        AnalyticCostModel(config, plan_deployment(config, MODEL))
