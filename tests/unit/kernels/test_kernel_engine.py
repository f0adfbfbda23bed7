"""Whole stages with kernels: the same logits as transformers."""

from __future__ import annotations

import pytest
import torch
from decode_steps import Again
from generation import generate
from kernel_device import DEVICE, IS_INTERPRETED
from tiny_models import MODELS, make_model, prompts

from fastserve_mega.system.config import Config, KvCacheConfig, ModelConfig, ParallelConfig
from fastserve_mega.types import SamplingParams
from fastserve_mega.worker.kernels.sampling import draw
from fastserve_mega.worker.megatron import megatron_runner
from fastserve_mega.worker.megatron.engine import TorchEngine
from fastserve_mega.worker.megatron.kernel_engine import KernelEngine
from fastserve_mega.worker.megatron.megatron_runner import MegatronRunner
from fastserve_mega.worker.model_runner import SequenceInput, StepOutput
from fastserve_mega.worker.topology import Topology

BLOCK_SIZE = 4
SOON = ("llama", "gemma3", "gpt2")
"""Rotation and RMSNorm; heads and addends normed, windows, and norms kept as differences from 1;
LayerNorm, biases and learned positions. The others take minutes in the interpreter."""
BY_TORCH = ("phi4-mini", "olmo2", "olmo3", "granite")
"""Families that ask for what the kernels lack (`engine_choice`)."""


@pytest.fixture
def open_runner(monkeypatch):
    """Opens a runner with kernels, closed at the end."""
    opened = []
    monkeypatch.setattr(megatron_runner, "open_engine", lambda _, *parts: KernelEngine(*parts))

    def open_one(directory, quantization="none", **kv_cache):
        config = Config(
            model=ModelConfig(path=str(directory), dtype="float32", quantization=quantization),
            parallel=ParallelConfig(device=DEVICE.type, threads_per_rank=1),
            kv_cache=KvCacheConfig(block_size=BLOCK_SIZE, device_blocks=40, **kv_cache),
        )
        opened.append(MegatronRunner(config, Topology(), "", 0))
        return opened[-1]

    yield open_one
    for runner in opened:
        runner.close()


@pytest.mark.parametrize(
    "family",
    [
        name if name in SOON else pytest.param(name, marks=pytest.mark.slow)
        for name in MODELS
        if name not in BY_TORCH
    ],
)
def test_logits_equal_transformers(family, tmp_path, open_runner):
    model = make_model(family, tmp_path)
    runner = open_runner(tmp_path)
    seen = []
    sampler = runner._sampler

    def sample(logits, sequences):
        seen.append(logits.cpu())
        return sampler(logits, sequences)

    sample.prepare = sampler.prepare
    runner._sampler = sample
    prompt = prompts()[3] if IS_INTERPRETED else prompts()[5]
    params = SamplingParams(max_tokens=2, temperature=0.0)
    # In chunks, then one token; a second prompt beside the chunks.
    (output, _) = generate(runner, [prompt, prompt[:2]], params, block_size=BLOCK_SIZE, chunk=9)
    with torch.inference_mode():
        expected = model(torch.tensor([prompt + output[:1]]), use_cache=False).logits[0, -2:]
    got = [row for logits in seen for row in logits]
    for row in expected:
        assert min((row - other).abs().max() for other in got) < 1e-3
    assert output == expected.argmax(dim=-1).tolist()


def test_weights_in_8_bits_are_multiplied_as_by_torch(tmp_path, open_runner, monkeypatch):
    make_model("llama", tmp_path)
    runner = open_runner(tmp_path, "fp8")
    logits = []
    monkeypatch.setattr(runner, "_sampler", Keep(logits))
    parts = (runner._stage, runner.architecture, runner._partition, runner.cache)
    for engine in (runner._engine, TorchEngine(*parts)):
        monkeypatch.setattr(runner, "_engine", engine)
        params = SamplingParams(max_tokens=1)
        generate(runner, [prompts()[3]], params, block_size=BLOCK_SIZE)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-3)


@pytest.mark.parametrize("recorded", [False, True])
def test_steps_take_their_tokens_from_where_the_last_ones_were_drawn(
    recorded, tmp_path, open_runner, monkeypatch
):
    """Three steps are launched before the host looks at any token, of two prompts in two orders."""
    monkeypatch.setattr(megatron_runner, "choose_draw", lambda *_: draw)
    make_model("llama", tmp_path)
    runner = open_runner(tmp_path)
    if recorded:
        assert runner._engine.record_graphs(2, 40, Again(), draw) == 2
    params = SamplingParams(max_tokens=4, temperature=1.2, top_k=30)
    pair = [prompts()[3][:3], prompts()[3][:7]]
    expected = generate(runner, pair, params, block_size=BLOCK_SIZE)

    def step(number, row, tokens):
        start = len(pair[row]) + number - 1 if number else 0
        first = 20 + 5 * row
        return SequenceInput(
            str(row), tokens, start, range(first, first + 5), True, params, 0, len(pair[row])
        )

    launched = [runner.launch([step(0, row, pair[row]) for row in (0, 1)])]
    launched.append(runner.launch([step(1, row, (-1 - row,)) for row in (1, 0)]))
    launched.append(runner.launch([step(2, row, (-1 - at,)) for at, row in enumerate((1, 0))]))
    launched.append(runner.launch([step(3, 0, (-2,))]))
    told = [wait().token_ids for wait in launched]
    assert [told[0][0], told[1][1], told[2][1], told[3][0]] == expected[0]
    assert [told[0][1], told[1][0], told[2][0]] == expected[1][:3]


class Keep:
    """In the place of a sampler."""

    def __init__(self, kept):
        self._kept = kept

    def prepare(self, sequences):
        pass

    def __call__(self, logits, sequences):
        self._kept.append(logits.cpu())
        return StepOutput([0] * len(sequences))
