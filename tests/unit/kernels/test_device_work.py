"""What a step gives the device to do, counted on the meta device, which computes nothing.

Whatever reads a value of the device back raises there.
"""

from __future__ import annotations

import dataclasses
import json

import kernel_device  # noqa: F401  (skips where Triton is missing)
import pytest
import torch
import torch.distributed as dist
from decode_steps import Again, decodes
from torch.utils._python_dispatch import TorchDispatchMode

from fastserve_mega.models.architecture import load_architecture
from fastserve_mega.system.config import Config, ModelConfig, ParallelConfig, SchedulerConfig
from fastserve_mega.system.partition import partition_model
from fastserve_mega.types import SamplingParams
from fastserve_mega.worker.kernels import launching
from fastserve_mega.worker.kernels.sampling import draw
from fastserve_mega.worker.kv_cache import KvCache
from fastserve_mega.worker.megatron import decode_graphs, engine_choice
from fastserve_mega.worker.megatron.decode_graphs import recorded_sizes
from fastserve_mega.worker.megatron.engine import TorchEngine
from fastserve_mega.worker.megatron.initialize import join_process_groups
from fastserve_mega.worker.megatron.kernel_engine import KernelEngine
from fastserve_mega.worker.megatron.layer_spec import choose_layers
from fastserve_mega.worker.megatron.model import build_stage
from fastserve_mega.worker.sampler import Sampler
from fastserve_mega.worker.step_batch import PackedStep, StepShape
from fastserve_mega.worker.topology import Topology

META = torch.device("meta")
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
    "max_position_embeddings": 8192, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
}  # fmt: skip
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2,
    "sliding_window": None,
}  # fmt: skip
CROSSING = "copy between host and device"
MOST_KERNELS = 10
"""Of a layer: four products, rotation and cache, attention and its merge, two norms, activation."""

OUTSIDE_LAYERS = 6
"""Of a step: its upload, embedding, first norm, rows to sample, logits; one to spare."""


@pytest.fixture(scope="module")
def groups():
    yield join_process_groups(ParallelConfig(), Topology(), torch.device("cpu"), "", 0)
    dist.destroy_process_group()


@pytest.fixture
def open_engine(groups, tmp_path):
    def open_one(layers, float8=False, **changes):
        fields = {**LLAMA, "num_hidden_layers": layers, **changes}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        architecture = load_architecture(tmp_path)
        partition = partition_model(architecture, ParallelConfig(), 0, 1)
        choice = choose_layers("local", architecture, META, float8=float8)
        stage = build_stage(
            architecture, partition, groups, choice, dtype=torch.bfloat16, device=META
        )
        cache = KvCache(
            num_blocks=64, num_layers=layers, num_kv_heads=8, block_size=16, head_dim=128,
            dtype=torch.bfloat16, device=META,
        )  # fmt: skip
        return KernelEngine(stage, architecture, partition, cache)

    return open_one


class Work(TorchDispatchMode):
    """Logs what the device is given: kernels by name, with the storages they did not make."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.log = []
        self._made = {}
        monkeypatch.setattr(launching, "launch", self._launch)

    def _launch(self, kernel, grid, *arguments, **constants):
        numbers = [a for a in arguments if not isinstance(a, torch.Tensor)]
        self._add(kernel.fn.__name__, arguments, (grid, *numbers, *constants.items()))

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        name = function._schema.name
        tensors = [a for a in (*arguments, result) if isinstance(a, torch.Tensor)]
        if all(tensor.is_cpu for tensor in tensors):
            return result
        if name in ("aten::_to_copy", "aten::copy_") and len({t.device for t in tensors}) > 1:
            name = CROSSING
        makes_room = name in ("aten::empty", "aten::empty_like", "aten::new_empty")
        if not makes_room and not function.is_view and name != "aten::detach":
            numbers = [a for a in arguments if isinstance(a, int | float)]
            self._add(name, arguments, numbers)
        if not function.is_view:
            for made in result if isinstance(result, tuple | list) else (result,):
                if isinstance(made, torch.Tensor):
                    self._made[made.untyped_storage()._cdata] = made  # kept, to stay its own
        return result

    def _add(self, name, arguments, numbers):
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        storages = [t.untyped_storage()._cdata for t in tensors]
        self.log.append(
            (name, tuple(s for s in storages if s not in self._made), tuple(map(str, numbers)))
        )

    @property
    def names(self):
        return [name for name, _, _ in self.log]


@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize("sequences", [1, 16, 64])
def test_a_layer_is_ten_kernels_and_a_step_one_upload(open_engine, monkeypatch, float8, sequences):
    names = []
    for layers in (2, 4):
        engine = open_engine(layers, float8)
        with Work(monkeypatch) as work:
            engine.run(decodes(sequences, 1024), lambda: None)
        names.append(work.names)
    added = (len(names[1]) - len(names[0])) / 2
    assert added <= MOST_KERNELS, names[1]
    assert names[1].count("aten::_scaled_mm") == (4 * 4 if float8 else 0)
    outside = len(names[0]) - 2 * added
    assert outside <= OUTSIDE_LAYERS, names[0]
    assert names[1].count(CROSSING) == 1
    assert ("_merge" in names[1]) is (sequences < 64)  # contexts are split among programs
    assert {"_attend", "_rotate_and_write", "_norm", "_activate"} <= set(names[1])


def test_a_decoding_step_is_one_upload_one_graph_and_one_wait(open_engine, monkeypatch):
    """From the batch to its tokens, whatever the sampling rules."""
    engine = open_engine(2)
    monkeypatch.setattr(launching, "launch", lambda *arguments, **constants: None)
    count = engine.record_graphs(16, 1024, Again(), draw)
    assert count == len(recorded_sizes(16))
    waits = []

    def read(tensor):
        waits.append(tensor.shape)
        return [[1.0, 0.0]] * len(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", read)
    batch, drawn = decodes(12, 900), []
    object.__setattr__(batch[3], "params", SamplingParams(temperature=0.7, top_p=0.9, top_k=5))
    with Work(monkeypatch) as work:
        logits = engine.run(batch, lambda: None, drawn=drawn.append)
        output = Sampler((2,), draw=draw)(logits, batch, *drawn)
    assert output.token_ids == [1] * 12
    assert waits == [(12, 2)]
    assert work.names.count(CROSSING) == 1
    # The stand-in of a graph copies its two results, which a graph does not.
    assert len(work.names) - 2 <= 2 * MOST_KERNELS + OUTSIDE_LAYERS + 1, work.names
    assert work.names.count("_draw") == 1


@pytest.mark.parametrize("changes", [{}, MIXTRAL])
def test_steps_of_a_shape_do_the_same_on_the_same_memory(open_engine, monkeypatch, changes):
    """So that a recorded graph computes any step of its shape, whatever experts it chooses."""
    engine = open_engine(2, **changes)
    shape = StepShape.of_decodes(8, 64)
    packed = PackedStep(decodes(5), 16, shape)
    step = packed.on(torch.from_numpy(packed.numbers).to(META))
    logs = []
    for _ in range(2):
        with Work(monkeypatch) as work:
            engine._compute(step, None)
        logs.append(work.log)
    assert logs[0] == logs[1]
    assert "_merge" in work.names
    assert {CROSSING, "aten::_local_scalar_dense", "aten::nonzero"}.isdisjoint(work.names)


@pytest.mark.parametrize(
    ("wanted", "kind", "message"),
    [
        ("auto", KernelEngine, "kernels (recording graphs of decoding steps)"),
        ("graphs", KernelEngine, "recorded 3 graphs in"),
        ("kernels", KernelEngine, "kernels (cuda_engine=kernels)"),
        ("torch", TorchEngine, "torch (parallel.cuda_engine=torch)"),
    ],
)
def test_the_engine_is_chosen_and_said(  # noqa: PLR0917
    open_engine, monkeypatch, caplog, wanted, kind, message
):
    caplog.set_level("INFO")
    monkeypatch.setattr(launching, "launch", lambda *arguments, **constants: None)
    monkeypatch.setattr(decode_graphs, "CudaRecorder", Again)
    parts = hopper(monkeypatch, open_engine(2))
    config = Config(
        model=ModelConfig(path="x"),
        parallel=ParallelConfig(cuda_engine=wanted),
        scheduler=SchedulerConfig(max_batch_size=4),
    )
    engine = engine_choice._open_on_cuda(config, *parts, is_trial=False)
    assert type(engine) is kind
    assert message in caplog.text
    caplog.clear()
    engine_choice._open_on_cuda(config, *parts, is_trial=True)
    assert not caplog.text


def hopper(monkeypatch, engine, capability=(9, 0)):
    """A device as the engine's parts would be on, and they."""
    engine_choice._triton_obstacle.cache_clear()
    monkeypatch.setattr(engine_choice, "_capability", lambda device: capability)
    return engine._stage, engine._architecture, engine._partition, engine._cache


@pytest.mark.parametrize(
    ("capability", "changes", "reason"),
    [
        ((9, 0), {"head_dim": 512}, "the kernels have no head_dim of 512"),
        (
            (9, 0),
            {"architectures": ["GraniteForCausalLM"], "residual_multiplier": 0.2},
            "the kernels have no scale of the residual",
        ),
        ((7, 5), {}, "the kernels need compute capability 8.0, the GPU has 7.5"),
        ((8, 6), {"float8": True}, "the kernels have no 8 bits on a GPU of compute capability 8.6"),
    ],
)
def test_an_engine_that_cannot_be_is_refused_with_the_reason(  # noqa: PLR0917
    open_engine, monkeypatch, caplog, capability, changes, reason
):
    caplog.set_level("INFO")
    monkeypatch.setattr(launching, "launch", lambda *arguments, **constants: None)
    parts = hopper(monkeypatch, open_engine(2, **changes), capability)
    config = Config(model=ModelConfig(path="x"), parallel=ParallelConfig(cuda_engine="kernels"))
    with pytest.raises(ValueError, match=f"cuda_engine=kernels, but {reason}"):
        engine_choice._open_on_cuda(config, *parts, is_trial=False)
    engine = engine_choice._open_on_cuda(Config(model=config.model), *parts, is_trial=False)
    assert type(engine) is TorchEngine
    assert f"steps on the GPU: torch ({reason})" in caplog.text


def test_where_triton_compiles_nothing_torch_computes_and_draws(open_engine, monkeypatch, caplog):
    caplog.set_level("INFO")

    def fail(*arguments, **constants):
        raise RuntimeError("Failed to find C compiler.\nSee the documentation.")

    monkeypatch.setattr(launching, "launch", fail)
    parts = hopper(monkeypatch, open_engine(2))
    config = Config(model=ModelConfig(path="x"))
    engine = engine_choice._open_on_cuda(config, *parts, is_trial=False)
    assert type(engine) is TorchEngine
    assert "torch (Triton cannot compile here: Failed to find C compiler.)" in caplog.text
    assert engine_choice._triton_obstacle(META)
    engine_choice._triton_obstacle.cache_clear()


def test_all_ranks_of_a_layer_compute_alike(open_engine, monkeypatch, caplog):
    """Where one of them has no compiler, none uses kernels: they wait for each other in a layer."""
    caplog.set_level("INFO")
    monkeypatch.setattr(launching, "launch", lambda *arguments, **constants: None)
    parts = hopper(monkeypatch, open_engine(2))
    group = parts[0].groups.tensor
    monkeypatch.setattr(engine_choice.dist, "get_world_size", lambda asked: 2 * (asked is group))
    asked = []

    def sum_up(obstacles, group):
        asked.append((obstacles.device, group))
        obstacles += 1

    monkeypatch.setattr(engine_choice.dist, "all_reduce", sum_up)
    monkeypatch.setattr(torch.Tensor, "item", lambda _: 1)
    engine = engine_choice._open_on_cuda(
        Config(model=ModelConfig(path="x")), *parts, is_trial=False
    )
    assert type(engine) is TorchEngine
    assert asked == [(META, group)]
    assert "steps on the GPU: torch (another rank cannot compute so)" in caplog.text


def test_what_goes_to_the_next_stage_is_not_overwritten_by_the_next_step(open_engine, monkeypatch):
    engine = open_engine(2)
    monkeypatch.setattr(launching, "launch", lambda *arguments, **constants: None)
    results = {}
    for is_last in (True, False):
        partition = dataclasses.replace(engine._partition, num_stages=1 if is_last else 2)
        monkeypatch.setattr(engine, "_partition", partition)
        assert engine.record_graphs(4, 1024, Again(), draw) == 3
        pair = [engine.run(decodes(2), lambda: None) for _ in range(2)]
        results[is_last] = len({each.untyped_storage()._cdata for each in pair})
    assert results == {True: 1, False: 2}
