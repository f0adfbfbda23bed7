"""The native step beside torch's, and that a row's result depends on nothing but the row."""

from __future__ import annotations

import contextlib

import pytest
import torch
from generation import generate
from tiny_models import MIXTURES, MODELS, make_model, prompts

from fastserve_mega.models.architecture import load_architecture
from fastserve_mega.system.config import Config, KvCacheConfig, ModelConfig, ParallelConfig
from fastserve_mega.system.partition import partition_model
from fastserve_mega.types import RequestId, SamplingParams
from fastserve_mega.worker.kv_cache import KvCache
from fastserve_mega.worker.megatron.checkpoint import open_checkpoint
from fastserve_mega.worker.megatron.initialize import join_process_groups
from fastserve_mega.worker.megatron.layer_spec import LayerChoice
from fastserve_mega.worker.megatron.megatron_runner import MegatronRunner
from fastserve_mega.worker.megatron.model import build_stage
from fastserve_mega.worker.megatron.native_engine import NativeEngine
from fastserve_mega.worker.model_runner import SequenceInput
from fastserve_mega.worker.native.library import (
    InstructionSet,
    library_path,
    load_library,
)
from fastserve_mega.worker.topology import Topology

BLOCK_SIZE = 4
MAX_TOKENS = 8
FAMILIES = [name for name in MODELS if name not in MIXTURES]
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(
    not library_path().exists(), reason="the native step is not built (no compiler)"
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Family → its directory, made when first asked for."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            make_model(name, made[name])
        return made[name]

    return get


@pytest.fixture(scope="module")
def torchs(directory):
    """(family, precision) → outputs and logits of the torch engine."""
    known = {}

    def get(family, dtype):
        if (family, dtype) not in known:
            with open_runner(directory(family), "torch", dtype) as runner:
                known[family, dtype] = logits_of(runner, prompts())
        return known[family, dtype]

    return get


@pytest.fixture(params=InstructionSet, ids=lambda each: each.name.lower())
def instruction_set(request, monkeypatch):
    library = load_library()
    if request.param > library.best_instruction_set:
        pytest.skip(f"this machine has no {request.param.title}")
    monkeypatch.setattr(library, "best_instruction_set", request.param)
    return request.param


@contextlib.contextmanager
def open_runner(directory, engine="native", dtype="float32", threads=2, quantization="none"):
    config = Config(
        model=ModelConfig(path=str(directory), dtype=dtype, quantization=quantization),
        parallel=ParallelConfig(device="cpu", threads_per_rank=threads, cpu_engine=engine),
        kv_cache=KvCacheConfig(block_size=BLOCK_SIZE, device_blocks=80),
    )
    runner = MegatronRunner(config, Topology(), "", 0)
    try:
        yield runner
    finally:
        runner.close()


def logits_of(runner, requests, max_tokens=MAX_TOKENS, chunk=512):
    """(request, tokens before) → logits, of a greedy run of the requests side by side."""
    seen, sampler = {}, runner._sampler

    def sample(logits, sequences):
        for row, sequence in zip(logits, sequences, strict=True):
            seen[sequence.request_id, sequence.context] = row.clone()
        return sampler(logits, sequences)

    sample.prepare = sampler.prepare
    runner._sampler = sample
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    outputs = generate(runner, requests, params, block_size=BLOCK_SIZE, chunk=chunk)
    runner._sampler = sampler
    return outputs, seen


def of_request(seen, index):
    return {context: row for (name, context), row in seen.items() if name == f"request-{index}"}


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for key, row in expected.items():
        assert torch.equal(found[key].view(torch.int32), row.view(torch.int32)), key


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_torch(directory, torchs, family, instruction_set):
    outputs, expected = torchs(family, "float32")
    with open_runner(directory(family)) as runner:
        found_outputs, found = logits_of(runner, prompts(), chunk=7)
    assert found_outputs == outputs
    for key, row in expected.items():
        torch.testing.assert_close(found[key], row, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2"])
def test_bfloat16_is_as_near_to_float32_as_torchs(directory, torchs, family, instruction_set):
    """At the first token of each answer: later ones may have other tokens before them."""
    _, exact = torchs(family, "float32")
    firsts = {(f"request-{index}", len(prompt)) for index, prompt in enumerate(prompts())}

    def error(found):
        return sum(float((found[key] - exact[key]).abs().mean()) for key in firsts)

    with open_runner(directory(family), dtype="bfloat16") as runner:
        _, found = logits_of(runner, prompts(), max_tokens=1)
    assert error(found) <= 1.2 * error(torchs(family, "bfloat16")[1])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2"])
def test_8_bit_weights_are_nearly_the_same_model(directory, torchs, family, instruction_set):
    """A wrong scale, group or offset would move logits by as much as they differ."""
    _, exact = torchs(family, "float32")
    with open_runner(directory(family), quantization="int8") as runner:
        _, found = logits_of(runner, prompts(), max_tokens=1)
    for key, row in found.items():
        assert (row - exact[key]).std() < 0.2 * exact[key].std(), key


@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [("float32", "none"), ("bfloat16", "none"), ("bfloat16", "int8")],
)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "opt"])
def test_a_row_does_not_depend_on_its_step(directory, family, dtype, quantization, instruction_set):
    """Alone, among others, in chunks, in other blocks, and recomputed: the same bits."""
    with open_runner(
        directory(family), dtype=dtype, threads=3, quantization=quantization
    ) as runner:
        outputs, crowd = logits_of(runner, prompts(), chunk=512)
        assert_same_bits(logits_of(runner, prompts(), chunk=7)[1], crowd)
        assert_same_bits(logits_of(runner, prompts(), chunk=3)[1], crowd)
        for index in (1, 5):
            expected = of_request(crowd, index)
            alone = of_request(logits_of(runner, prompts()[index : index + 1])[1], 0)
            assert_same_bits(alone, expected)
            again = [prompts()[index] + outputs[index][:5]]
            rest = of_request(logits_of(runner, again, MAX_TOKENS - 5, chunk=50)[1], 0)
            assert_same_bits(rest, {at: expected[at] for at in sorted(expected)[5:]})


def test_the_number_of_threads_does_not_show(directory):
    found = []
    for threads in (1, 2, 5):
        with open_runner(directory("llama"), dtype="bfloat16", threads=threads) as runner:
            found.append(logits_of(runner, prompts(), chunk=16)[1])
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])


def open_stages(directory, num_stages, dtype):
    """All stages of a pipeline in this process, each with its pool."""
    architecture = load_architecture(directory)
    parallel = ParallelConfig(device="cpu", pipeline=num_stages)
    groups = join_process_groups(ParallelConfig(device="cpu"), Topology(), CPU, "", 0)
    engines = []
    for rank in range(num_stages):
        partition = partition_model(architecture, parallel, rank, num_stages)
        choice = LayerChoice("local", "a test")
        stage = build_stage(architecture, partition, groups, choice, dtype=dtype, device=CPU)
        open_checkpoint(directory, architecture, partition).load(stage, lambda num_bytes: None)
        cache = KvCache(
            num_blocks=120,
            num_layers=len(partition.layers),
            num_kv_heads=len(partition.kv_heads),
            block_size=BLOCK_SIZE,
            head_dim=architecture.head_dim,
            dtype=dtype,
            device=CPU,
        )
        engines.append(NativeEngine(load_library(), stage, architecture, partition, cache))
    return engines


def sequence(tokens, start=0, table=range(1, 20), samples=True):
    return SequenceInput(
        request_id=RequestId("one"),
        token_ids=tokens,
        start=start,
        block_table=table,
        samples=samples,
        params=SamplingParams(),
        seed=0,
        prompt_tokens=1,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_a_long_step_has_the_bits_of_short_ones(directory, family, dtype, instruction_set):
    """So long that the threads go through the layers apart."""
    torch.set_num_threads(2)
    requests = [list(range(3 + index, 103 + index)) for index in range(4)]
    batch = [
        sequence(tokens, table=range(1 + 25 * index, 26 + 25 * index))
        for index, tokens in enumerate(requests)
    ]
    (engine,) = open_stages(directory(family), 1, dtype)
    together = engine.run(batch, lambda: None)
    alone = torch.cat([engine.run([each], lambda: None) for each in batch])
    engine.close()
    torch.distributed.destroy_process_group()
    assert together.shape == (4, 131)
    assert torch.equal(together.view(torch.int32), alone.view(torch.int32))


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_rows_that_nobody_samples_leave_their_keys_and_values(directory, family):
    """They end in the last layer, of which the next token must find all that it reads."""
    prompt, other = prompts()[1], sequence([5, 6, 7], table=range(40, 60))
    (engine,) = open_stages(directory(family), 1, torch.bfloat16)
    expected = engine.run([sequence(prompt)], lambda: None)
    first = [sequence(prompt[:-1], samples=False), other]
    assert torch.equal(engine.run(first, lambda: None), engine.run([other], lambda: None))
    last = engine.run([sequence(prompt[-1:], start=len(prompt) - 1)], lambda: None)
    assert engine.run([sequence(prompt, samples=False)], lambda: None).shape[0] == 0
    engine.close()
    torch.distributed.destroy_process_group()
    assert torch.equal(last.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "llama-one-kv-head", "gpt2"])
def test_stages_compute_what_one_does(directory, family, dtype):
    steps = [[sequence(prompts()[1])], [sequence([7], start=33)]]
    results = []
    for num_stages in (1, 2, 3):
        engines = open_stages(directory(family), num_stages, dtype)
        for step in steps:
            hidden = None
            for engine in engines:
                hidden = engine.run(step, lambda handed=hidden: handed)
            results.append(hidden)
        for engine in engines:
            engine.close()
        torch.distributed.destroy_process_group()
    assert results[0].shape == (1, 131)
    assert_same_bits(dict(enumerate(results)), dict(enumerate(3 * results[:2])))


def test_numbers_out_of_range_are_refused(directory):
    with open_runner(directory("llama")) as runner:
        with pytest.raises(ValueError, match="token id 131 is not between 0 and 130"):
            runner.execute([sequence([131])])
        with pytest.raises(ValueError, match="block 80 is not between 0 and 79"):
            runner.execute([sequence([5], table=[80])])
        with pytest.raises(ValueError, match="its 1 blocks hold 4"):
            runner.execute([sequence([5] * 5, table=[1])])


def test_weights_are_held_once(directory):
    """What is laid out is freed; the table of an untied embedding stays as it was."""
    with open_runner(directory("llama")) as runner:
        held = {name: each.numel() for name, each in runner._stage.parameters().items()}
        assert held["embedding.word_embeddings.weight"] == 131 * 32
        assert not any(held[name] for name in held if "linear" in name or "output" in name)
    with open_runner(directory("llama-one-kv-head")) as runner:
        assert not runner._stage.parameters()["embedding.word_embeddings.weight"].numel()
