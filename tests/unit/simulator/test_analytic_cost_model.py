from __future__ import annotations

import pytest

from fastserve_mega.plan import SequenceSlice
from fastserve_mega.simulator.analytic_cost_model import AnalyticCostModel, StepWork, step_work
from fastserve_mega.system.hardware import DEVICES, LINKS, MODELS, Device, Link, Mesh, ModelShape
from fastserve_mega.types import RequestId

MEMORY = 1e9
FLOPS = 1e9


def toy(mesh: Mesh | None = None, **options: float) -> AnalyticCostModel:
    """1 GB/s and 1 GFLOP/s; a model of two layers of 3,072 parameters each."""
    device = Device(
        name="toy", memory_bytes=10**6, memory_bandwidth=MEMORY, peak_flops=FLOPS,
        host_bandwidth=1e6, memory_efficiency=1.0, compute_efficiency=1.0, host_efficiency=1.0,
    )  # fmt: skip
    shape = ModelShape(
        name="toy", layers=2, hidden_size=16, num_heads=2, num_kv_heads=2, head_dim=8,
        ffn_hidden_size=64, vocab_size=100,
    )  # fmt: skip
    return AnalyticCostModel(
        device, shape, mesh or Mesh(), max_batch_tokens=8,
        interconnect=Link(name="fast", bandwidth=1e6, latency_s=1e-6),
        network=Link(name="slow", bandwidth=1e5, latency_s=1e-5),
        **{"layer_overhead_s": 0.0, "step_overhead_s": 0.0, **options},
    )  # fmt: skip


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
    model = toy(Mesh(tensor=2, pipeline=2), step_overhead_s=1e-3, layer_overhead_s=1e-4)
    work = step_work([piece(50, 1)] * 3)
    assert model.decode_s(3, 50) == pytest.approx(model.step_s(work))


def test_tensor_ranks_share_the_work_and_pay_for_all_reduces() -> None:
    alone, pair = toy(), toy(Mesh(tensor=2))
    # two layers, two all-reduces each, of 16 values of 2 bytes: half is sent twice
    all_reduces_s = 4 * (1e-6 + 32 / 1e6)
    assert pair.decode_s(1, 9) == pytest.approx(alone.decode_s(1, 9) / 2 + all_reduces_s)


def test_tensor_ranks_on_two_nodes_use_the_network() -> None:
    near, far = toy(Mesh(tensor=2)), toy(Mesh(tensor=2, devices_per_node=1))
    slower_s = 4 * (1e-5 + 32 / 1e5) - 4 * (1e-6 + 32 / 1e6)
    assert far.decode_s(1, 9) - near.decode_s(1, 9) == pytest.approx(slower_s)


def test_stages_share_the_layers_and_the_last_has_the_head() -> None:
    whole, staged = toy(), toy(Mesh(pipeline=2))
    work = step_work([piece(9, 1)])
    first_s, last_s = staged.stage_times(work)
    assert first_s + last_s == pytest.approx(whole.stage_times(work)[0])
    assert last_s - first_s == pytest.approx(2 * 16 * 100 / MEMORY)
    assert staged.hop_times(3) == [pytest.approx(1e-6 + 3 * 32 / 1e6), 0.0]


def test_copies_move_the_shards_of_all_ranks_at_once() -> None:
    assert toy().copy_s(3, block_size=16) == pytest.approx(3 * 2 * 2 * 16 * 2 * 16 / 1e6)
    assert toy(Mesh(tensor=2)).copy_s(3, 16) == pytest.approx(toy().copy_s(3, 16) / 2)


def test_a_mesh_that_cannot_divide_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mesh.tensor 3 does not divide the 2 heads of toy"):
        toy(Mesh(tensor=3))
    with pytest.raises(ValueError, match=r"mesh.pipeline 3 exceeds the 2 layers of toy"):
        toy(Mesh(pipeline=3))


def test_a_model_too_big_for_the_memory_is_refused() -> None:
    with pytest.raises(ValueError, match=r"toy does not fit on 1 x toy: 0.0 GB of weights"):
        toy().device_blocks(16, 0.9, 1e9)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("opt-13b", 12.85), ("opt-66b", 65.7), ("opt-175b", 174.6), ("llama-3-8b", 8.03)],
)
def test_parameters_add_up_to_the_published_sizes(name: str, billions: float) -> None:
    assert MODELS[name].parameters / 1e9 == pytest.approx(billions, rel=0.005)


def test_opt_13b_on_an_a100_has_the_papers_kv_memory() -> None:
    model = AnalyticCostModel(
        DEVICES["a100-40g"], MODELS["opt-13b"], Mesh(), max_batch_tokens=2048,
        interconnect=LINKS["pcie-4"], network=LINKS["network-400g"],
    )  # fmt: skip
    assert MODELS["opt-13b"].kv_bytes_per_token == 819_200
    assert model.device_blocks(16, 0.9, 1e9) == pytest.approx(912, abs=5)
    assert model.copy_s(1, 16) == pytest.approx(16 * 819_200 / 25.6e9)
