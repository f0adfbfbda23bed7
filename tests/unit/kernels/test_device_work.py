"""What a step gives the device to do, counted on the meta device, which computes nothing.

Whatever reads a value of the device back raises there.
"""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist
from kernel_device import DEVICE
from torch.utils._python_dispatch import TorchDispatchMode

from fastserve_mega.models.architecture import load_architecture
from fastserve_mega.system.config import Config, ModelConfig, ParallelConfig, SchedulerConfig
from fastserve_mega.system.partition import partition_model
from fastserve_mega.types import RequestId, SamplingParams
from fastserve_mega.worker.kernels import launching
from fastserve_mega.worker.kernels.sampling import draw
from fastserve_mega.worker.kv_cache import KvCache
from fastserve_mega.worker.megatron import decode_graphs, engine_choice
from fastserve_mega.worker.megatron.decode_graphs import DecodeGraphs, recorded_sizes
from fastserve_mega.worker.megatron.engine import TorchEngine
from fastserve_mega.worker.megatron.initialize import join_process_groups
from fastserve_mega.worker.megatron.kernel_engine import KernelEngine
from fastserve_mega.worker.megatron.layer_spec import choose_layers
from fastserve_mega.worker.megatron.model import build_stage
from fastserve_mega.worker.model_runner import SequenceInput
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


def decodes(count, context=100):
    return [
        SequenceInput(
            request_id=RequestId(str(index)),
            token_ids=[1],
            start=context - 1,
            block_table=range(1, 1 + -(-context // 16)),
            samples=True,
            params=SamplingParams(),
            seed=0,
            prompt_tokens=4,
        )
        for index in range(count)
    ]


@pytest.mark.parametrize("float8", [False, True])
def test_a_layer_is_ten_kernels_and_a_step_one_upload(open_engine, monkeypatch, float8):
    names = []
    for layers in (2, 4):
        engine = open_engine(layers, float8)
        with Work(monkeypatch) as work:
            engine.run(decodes(64, 1024), lambda: None)
        names.append(work.names)
    added = (len(names[1]) - len(names[0])) / 2
    # What attention gives is scaled by a kernel of its own.
    assert added <= MOST_KERNELS + float8, names[1]
    assert names[1].count("aten::_scaled_mm") == (4 * 4 if float8 else 0)
    outside = len(names[0]) - 2 * added
    assert outside <= OUTSIDE_LAYERS, names[0]
    assert names[1].count(CROSSING) == 1
    # Decoding few sequences, their contexts are split among programs.
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
    given = open_engine(2)
    parts = (given._stage, given._architecture, given._partition, given._cache)
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


def test_an_engine_that_cannot_be_is_refused_with_the_reason(open_engine, monkeypatch):
    given = open_engine(2)
    parts = (given._stage, given._architecture, given._partition, given._cache)
    config = Config(model=ModelConfig(path="x"), parallel=ParallelConfig(cuda_engine="kernels"))
    monkeypatch.setattr(engine_choice, "_MAX_KERNEL_HEAD_DIM", 64)
    with pytest.raises(ValueError, match="cuda_engine=kernels, but the kernels have no head_dim"):
        engine_choice._open_on_cuda(config, *parts, is_trial=False)


class Again:
    """Records by computing again, into the tensors that the first computation gave."""

    def record(self, compute):
        results = compute()

        def replay():
            for result, again in zip(results, compute(), strict=True):
                if result is not None:
                    result.copy_(again)
            return results

        return replay


def test_a_step_takes_the_next_larger_graph_or_none():
    computed = []

    def compute(step, hidden):
        computed.append(step.contexts.shape[0])
        return step.contexts[:, None].clone()

    graphs = DecodeGraphs(
        compute, block_size=16, device=torch.device("cpu"), hidden=None, recorder=Again()
    )
    assert graphs.record(max_sequences=4, max_context=160) == 3
    assert computed == [4, 2, 1]
    result, drawn = graphs.run([*decodes(1, 90), *decodes(2, 160)], lambda: None)
    assert drawn is None
    assert result.flatten().tolist() == [160, 160, 90]
    assert computed[3:] == [4]
    prefill = decodes(1)[0]
    object.__setattr__(prefill, "token_ids", [1, 2])
    for batch in (decodes(5), decodes(1, 161), [prefill]):
        assert graphs.run(batch, lambda: None) is None
    assert computed[3:] == [4]


def test_what_an_earlier_stage_hands_over_is_copied_to_where_the_graph_reads_it():
    graphs = DecodeGraphs(
        lambda step, hidden: hidden * 2,
        block_size=16,
        device=torch.device("cpu"),
        hidden=(3, torch.float32),
        recorder=Again(),
    )
    graphs.record(max_sequences=2, max_context=160)
    for value in (1.0, 5.0):
        received = torch.full((2, 3), value)
        result, _ = graphs.run(decodes(2), lambda received=received: received)
        assert torch.equal(result, 2 * received)


def test_tokens_are_drawn_in_the_graph_by_the_rules_of_each_step():
    """And are those that the sampler draws of the same logits, one kernel after the other."""
    logits = torch.randn((4, 150), generator=torch.Generator().manual_seed(7)).to(DEVICE)
    graphs = DecodeGraphs(
        lambda step, hidden: logits[step.token_ids[step.sample_rows]],
        block_size=16, device=DEVICE, hidden=None, recorder=Again(), draw=draw,
    )  # fmt: skip
    graphs.record(max_sequences=4, max_context=160)
    rules_of_rows = ({"temperature": 0.0}, {"temperature": 2.0}, {"temperature": 1.5, "top_k": 9})
    sampler, seen = Sampler((3,), draw=draw), set()
    for position in (20, 21):
        batch = decodes(3, position)
        for row, (each, rules) in enumerate(zip(batch, rules_of_rows, strict=True)):
            object.__setattr__(each, "token_ids", [row])
            object.__setattr__(each, "params", SamplingParams(**rules))
        result, drawn = graphs.run(batch, lambda: None)
        output = sampler(result, batch, drawn)
        assert output.token_ids == Sampler((3,))(logits[:3], batch).token_ids
        seen.add(tuple(output.token_ids))
    assert len(seen) == 2


def test_what_is_drawn_in_the_graph_does_not_count_where_requests_change_the_logits():
    logits = torch.zeros((1, 8), device=DEVICE)
    batch = decodes(1)
    greedy = SamplingParams(temperature=0.0, logit_bias={5: 2.0})
    object.__setattr__(batch[0], "params", greedy)
    drawn = torch.tensor([[3.0, 0.0]], dtype=torch.float64, device=DEVICE)
    assert Sampler((), draw=draw)(logits, batch, drawn).token_ids == [5]


def test_few_graphs_for_any_number_of_sequences():
    assert recorded_sizes(3) == [1, 2, 3]
    assert recorded_sizes(16) == [1, 2, 4, 8, 16]
    assert len(recorded_sizes(256)) < 30
    assert recorded_sizes(250)[-2:] == [240, 250]
