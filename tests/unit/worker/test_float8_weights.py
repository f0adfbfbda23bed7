"""Weights in 8 bits: products of them, checkpoints that have them, and others made into such."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from generation import generate
from safetensors.torch import load_file, save_file
from tiny_models import make_model, prompts

from fastserve_mega.models.architecture import load_architecture
from fastserve_mega.system.config import Config, KvCacheConfig, ModelConfig, ParallelConfig
from fastserve_mega.system.partition import partition_model
from fastserve_mega.system.sizes import weight_bytes
from fastserve_mega.system.weights import weights_of
from fastserve_mega.types import SamplingParams
from fastserve_mega.worker import float8
from fastserve_mega.worker.float8 import multiply, quantize_rows, widen
from fastserve_mega.worker.megatron.checkpoint import HuggingFaceCheckpoint
from fastserve_mega.worker.megatron.convert import convert
from fastserve_mega.worker.megatron.megatron_runner import MegatronRunner
from fastserve_mega.worker.topology import Topology

GREEDY = SamplingParams(max_tokens=8, temperature=0.0)
DEEPSEEK = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
    "weight_block_size": [32, 16],
}  # fmt: skip
LLM_COMPRESSOR = {
    "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True,
                "dynamic": False, "block_structure": None,
            },
            "input_activations": {
                "num_bits": 8, "type": "float", "strategy": "token", "dynamic": True,
            },
        },
    },
}  # fmt: skip


def by_tensor(weight):
    scale = weight.abs().max() / 448
    return (weight / scale).to(torch.float8_e4m3fn), scale


def by_output(weight):
    rows = quantize_rows(weight)
    return rows.values, rows.scales[:, None]


def by_block(weight):
    height, width = DEEPSEEK["weight_block_size"]
    grid = [-(-weight.shape[0] // height), -(-weight.shape[1] // width)]
    scales = torch.empty(grid)
    values = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    for row in range(grid[0]):
        for column in range(grid[1]):
            at = (
                slice(row * height, (row + 1) * height),
                slice(column * width, (column + 1) * width),
            )
            scales[row, column] = weight[at].abs().max() / 448
            values[at] = (weight[at] / scales[row, column]).to(torch.float8_e4m3fn)
    return values, scales


FORMS = {
    "by tensor": ({"quant_method": "fp8", "activation_scheme": "static"}, by_tensor, "_scale"),
    "by output": (LLM_COMPRESSOR, by_output, "_scale"),
    "by block": (DEEPSEEK, by_block, "_scale_inv"),
}


def is_linear(name):
    return "_proj." in name and name.endswith(".weight")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    directory = tmp_path_factory.mktemp("plain")
    make_model("llama", directory)
    return directory


@pytest.fixture
def written(plain, tmp_path):
    """Writes the model with its linears in 8 bits, and once more with what they stand for."""

    def write(form):
        settings, quantize, end = FORMS[form]
        small, wide = {}, {}
        for name, tensor in load_file(plain / "model.safetensors").items():
            small[name] = wide[name] = tensor
            if is_linear(name):
                small[name], small[name + end] = quantize(tensor.float())
                scale = small[name + end].float()
                if form == "by block":
                    for axis, size in enumerate(DEEPSEEK["weight_block_size"]):
                        scale = scale.repeat_interleave(size, axis)
                    scale = scale[: tensor.shape[0], : tensor.shape[1]]
                wide[name] = small[name].float() * scale
        config = json.loads((plain / "config.json").read_text())
        for title, tensors, added in (
            ("small", small, {"quantization_config": settings}), ("wide", wide, {}),
        ):  # fmt: skip
            (tmp_path / title).mkdir()
            save_file(
                {n: t.contiguous() for n, t in tensors.items()},
                tmp_path / title / "model.safetensors",
            )
            (tmp_path / title / "config.json").write_text(json.dumps({**config, **added}))
        return tmp_path / "small", tmp_path / "wide"

    return write


@contextlib.contextmanager
def open_runner(directory, quantization="none", dtype="float32"):
    config = Config(
        model=ModelConfig(path=str(directory), dtype=dtype, quantization=quantization),
        parallel=ParallelConfig(device="cpu", threads_per_rank=1, cpu_engine="auto"),
        kv_cache=KvCacheConfig(block_size=4, device_blocks=80),
    )
    runner = MegatronRunner(config, Topology(), "", 0)
    try:
        yield runner
    finally:
        runner.close()


def are_close(logits, before):
    """The first ones, but not equal; later ones may follow other tokens."""
    alike = torch.nn.functional.cosine_similarity(logits[0].float(), before[0].float(), dim=0)
    return 0.9 < alike < 0.9999


def told(directory, quantization="none", dtype="float32"):
    """Greedy tokens, and all logits on the way there."""
    seen = []
    with open_runner(directory, quantization, dtype) as runner:
        sampler = runner._sampler

        def sample(logits, sequences):
            seen.append(logits.clone())
            return sampler(logits, sequences)

        sample.prepare = sampler.prepare
        runner._sampler = sample
        return generate(runner, prompts()[:2], GREEDY, block_size=4, chunk=7), torch.cat(seen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("outputs", [48, 41])  # the second torch does not multiply in 8 bits
def test_products_are_those_of_the_numbers_that_the_bits_stand_for(dtype, outputs):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((5, 64), generator=generator).to(dtype)
    x[3] = 0
    weight = quantize_rows(torch.randn((outputs, 64), generator=generator))
    bias = torch.randn(outputs, generator=generator).to(dtype)
    got = multiply(x, weight.values, weight.scales, bias)
    rows = quantize_rows(x)
    expected = widen(rows.values, rows.scales) @ widen(weight.values, weight.scales).t() + bias
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected, rtol=2e-2, atol=2e-2)
    assert (widen(rows.values, rows.scales) - x.float()).abs().max() < x.abs().max() / 16


def test_the_largest_numbers_do_not_become_nan():
    rows = quantize_rows(torch.tensor([[3.4e38, -1.0], [1e-38, 0.0]]))
    assert widen(rows.values, rows.scales).isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_in_8_bits_becomes_what_it_stands_for(written, form):
    small, wide = written(form)
    tokens, logits = told(small)
    expected_tokens, expected = told(wide)
    assert tokens == expected_tokens
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mesh", [{"tensor": 2}, {"pipeline": 3}, {"tensor": 2, "pipeline": 2}])
def test_ranks_read_their_parts_in_8_bits(written, form, mesh):
    small, wide = written(form)
    architecture = load_architecture(small)
    parallel = ParallelConfig(**mesh)
    for rank in range(parallel.world_size):
        partition = partition_model(architecture, parallel, rank, parallel.world_size)
        linears = [w for w in weights_of(architecture, partition) if ".linear_" in w.name]
        assert len(linears) == 4 * len(partition.layers)
        with (
            HuggingFaceCheckpoint(small, architecture, partition) as reader,
            HuggingFaceCheckpoint(wide, architecture, partition) as other,
        ):
            for weight in linears:
                expected, scales = torch.empty(weight.shape), torch.empty(weight.shape[0])
                other.fill(weight, expected)
                values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
                reader.fill_float8(weight, values, scales)
                got = widen(values, scales)
                # Numbers far below the largest of their row lose something with scales of blocks.
                most = expected.abs().amax() / 16 if form == "by block" else 0.0
                assert (got - expected).abs().max() <= most


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_made_into_8_bits_as_they_are_loaded(plain, written, dtype):
    """The same as if somebody else had done it, and close to what they were."""
    small, _ = written("by output")
    tokens, logits = told(plain, "fp8", dtype)
    again_tokens, again = told(small, "fp8", dtype)
    assert tokens == again_tokens
    assert torch.equal(logits, again)
    _, before = told(plain, "none", dtype)
    assert are_close(logits, before)


@pytest.mark.parametrize("family", ["gpt2", "qwen2-moe", "qwen3", "gemma2"])
def test_other_families_and_experts_in_8_bits(family, tmp_path):
    make_model(family, tmp_path)
    _, logits = told(tmp_path, "fp8")
    _, before = told(tmp_path)
    assert are_close(logits, before)
    architecture = load_architecture(tmp_path)
    partition = partition_model(architecture, ParallelConfig(), 0, 1)
    model = ModelConfig(path="x", dtype="float32", quantization="fp8")
    with open_runner(tmp_path, "fp8") as runner:
        padding = 4 * runner._stage.parameters()["embedding.word_embeddings.weight"].numel()
        padding -= 4 * architecture.vocab_size * architecture.hidden_size
        assert runner._stage.num_bytes - padding == weight_bytes(architecture, partition, model)


def test_megatrons_own_format_is_refused_in_8_bits(plain, tmp_path):
    convert(plain, tmp_path / "megatron", "torch_dist")
    with pytest.raises(ValueError, match="quantization=fp8 needs Hugging Face's format"):
        told(tmp_path / "megatron", "fp8")


def test_a_checkpoint_in_8_bits_is_converted_to_what_it_stands_for(written, tmp_path):
    small, wide = written("by block")
    convert(small, tmp_path / "megatron", "torch_dist")
    _, logits = told(tmp_path / "megatron", dtype="bfloat16")
    _, expected = told(wide, dtype="bfloat16")
    assert torch.equal(logits, expected)
    assert "quantization_config" not in (tmp_path / "megatron" / "config.json").read_text()


def test_devices_without_8_bits_widen_them(monkeypatch):
    weight = quantize_rows(torch.ones((16, 16)))
    x = torch.ones((1, 16), dtype=torch.bfloat16)
    monkeypatch.setattr(float8, "_multiplies", lambda weight: False)
    monkeypatch.setattr(torch, "_scaled_mm", None)
    assert torch.equal(multiply(x, weight.values, weight.scales, None), 16 * torch.ones_like(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, name: tensors.pop(f"{name}_scale"), "in 8 bits, but has no scale beside"),
        (
            lambda tensors, name: tensors.update({f"{name}_scale": torch.ones(3, 1)}),
            r"weight_scale has shape \(3, 1\), which is none of those that scales of \(32, 32\)",
        ),
    ],
)
def test_scales_that_do_not_fit_are_one_sentence(written, change, message):
    small, _ = written("by output")
    tensors = load_file(small / "model.safetensors")
    change(tensors, "model.layers.1.self_attn.o_proj.weight")
    save_file(tensors, small / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        told(small)
