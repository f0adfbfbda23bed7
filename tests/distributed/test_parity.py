"""Token-for-token parity with transformers, in float32, over meshes of ranks.

From safetensors and from Megatron's distributed checkpoints, saved by some ranks, loaded by others.
"""

from __future__ import annotations

import shutil
from collections import defaultdict

import pytest
import torch
from generation import generate
from meshes import LAYOUTS, MAX_TOKENS, job, mpirun, num_ranks
from tiny_models import (
    MIXTURES,
    MODELS,
    SMOLLM2,
    greedy_after_each,
    last_hidden_state,
    make_model,
    prompts,
)

from fastserve_mega.system.config import Config, KvCacheConfig, ModelConfig, ParallelConfig
from fastserve_mega.types import SamplingParams
from fastserve_mega.worker.megatron.convert import convert
from fastserve_mega.worker.megatron.megatron_runner import MegatronRunner
from fastserve_mega.worker.topology import Topology

pytestmark = pytest.mark.distributed

# What differs in nothing that ranks divide is left to the tests of a single rank.
DIVIDED = [family for family in MODELS if family not in {"llama-scaled", "qwen3-yarn"}]
CASES = [(layout, family) for layout in ("tensor-2", "pipeline-2-uneven") for family in DIVIDED]
CASES += [("expert-2", family) for family in MIXTURES] + [("pipeline-2", "qwen2-moe")]
CASES += [("pipeline-3", "llama")]  # the stage in the middle receives and sends
FOUR = "tensor-2-pipeline-2"
# Each of the other families adds to the time of four ranks, and little to what they prove.
CASES += [(FOUR, "llama-one-kv-head"), (FOUR, "gpt2")]
CASES += [("expert-2-pipeline-2", "qwen3-moe"), ("tensor-4-expert-2", "qwen2-moe")]
SLOW = [(FOUR, family) for family in DIVIDED if (FOUR, family) not in CASES]

SMOLLM2_LAYOUTS = {
    "pipeline-2": {"tensor": 1, "pipeline": 2, "layers_per_stage": [14, 16]},
    "tensor-3": {"tensor": 3, "pipeline": 1},
}
ENGLISH = [[504, 3575, 282, 4649, 314], list(range(300, 340))]

EMBEDDED = [("tensor-2", "llama"), ("tensor-2", "gpt2"), ("pipeline-2-uneven", "llama")]

TWO_RANKS = ("tensor-2", "pipeline-2-uneven")
CHECKPOINTS = ("llama", "llama-one-kv-head", "qwen3", "opt", "gpt2", "qwen2-moe")
"""One of each kind: plain, heads shared and tied, more norms, positions, transposed, experts."""
SAVED_BY_FOUR = ("llama", "opt", "gpt2")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Family → (directory, transformers model)."""
    directories = {name: tmp_path_factory.mktemp(name) for name in MODELS}
    return {name: (path, make_model(name, path)) for name, path in directories.items()}


@pytest.fixture(scope="module")
def checkpoints(models, tmp_path_factory):
    """Family → Megatron's directory, saved as one rank would."""
    base = tmp_path_factory.mktemp("torch_dist")
    for name in CHECKPOINTS:
        convert(models[name][0], base / name, "torch_dist")
    return {name: base / name for name in CHECKPOINTS}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tmp_path_factory.mktemp("saved-by-several-ranks")


@pytest.fixture(scope="module")
def jobs(models, checkpoints, saved):
    """Jobs by launch (number of ranks, slow or not) and name."""
    launches = defaultdict(dict)

    def add(name, directory, layout, *, slow=False, **changes):
        launches[num_ranks(layout), slow][name] = job(directory, layout, **changes)

    for layout, family in CASES + SLOW:
        slow = (layout, family) in SLOW
        add(f"{layout}/{family}", models[family][0], LAYOUTS[layout], slow=slow)
    if SMOLLM2.is_dir():
        options = {"prompts": ENGLISH, "chunk": 16, "block_size": 16, "max_tokens": 8}
        for layout, settings in SMOLLM2_LAYOUTS.items():
            add(f"{layout}/smollm2", SMOLLM2, settings, **options)
    for layout in TWO_RANKS:
        for family, directory in checkpoints.items():
            add(f"{layout}/torch_dist/{family}", directory, LAYOUTS[layout])
    for layout, families in {"expert-2": ("qwen2-moe",), FOUR: SAVED_BY_FOUR}.items():
        for family in families:
            options = {"save_to": str(saved / family)}
            add(f"{layout}/torch_dist/{family}", checkpoints[family], LAYOUTS[layout], **options)
    for layout, family in EMBEDDED:
        name = f"{layout}/embeddings/{family}"
        add(name, models[family][0], LAYOUTS[layout], embeds=True)
    # One key-value head on two ranks is loaded, but cannot be saved.
    add(f"{FOUR}/torch_dist/llama-one-kv-head", checkpoints["llama-one-kv-head"], LAYOUTS[FOUR])
    return launches


@pytest.fixture(scope="module")
def outputs(jobs, tmp_path_factory):
    """Tokens by name of the job; a launch starts when the first of its jobs is asked for.

    So the slow ones only run where they are selected.
    """
    results = {}

    def get(*name):
        name = "/".join(name)
        if name not in results:
            ((ranks, _), some) = next(item for item in jobs.items() if name in item[1])
            results.update(mpirun(ranks, some, tmp_path_factory.mktemp(f"{ranks}-ranks")))
        return results[name]

    return get


@pytest.mark.parametrize(("layout", "family"), EMBEDDED)
def test_embeddings_equal_transformers(outputs, models, layout, family):
    embeddings = outputs(layout, "embeddings", family)
    for prompt, embedding in zip(prompts(), embeddings, strict=True):
        expected = last_hidden_state(models[family][1], prompt)
        torch.testing.assert_close(torch.tensor(embedding), expected)


def assert_greedy(model, outputs, some_prompts=None, max_tokens=MAX_TOKENS):
    for prompt, output in zip(some_prompts or prompts(), outputs, strict=True):
        assert len(output) == max_tokens
        assert output == greedy_after_each(model, prompt, output)


@pytest.mark.parametrize(
    ("layout", "family"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_greedy_tokens_equal_transformers(outputs, models, layout, family):
    assert_greedy(models[family][1], outputs(layout, family))


@pytest.fixture(scope="module")
def smollm2():
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype="float32").eval()


@pytest.mark.model
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason=f"{SMOLLM2} is missing (make model)")
@pytest.mark.parametrize("layout", SMOLLM2_LAYOUTS)
def test_smollm2_equals_transformers(outputs, smollm2, layout):
    assert_greedy(smollm2, outputs(layout, "smollm2"), ENGLISH, 8)


# --- Megatron's distributed checkpoints ----------------------------------------------------------


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


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_saved_by_one_rank_served_by_one(checkpoints, models, family):
    assert_greedy(models[family][1], run_alone(checkpoints[family]))


@pytest.mark.parametrize("family", CHECKPOINTS)
@pytest.mark.parametrize("layout", TWO_RANKS)
def test_saved_by_one_rank_served_by_two(outputs, models, layout, family):
    assert_greedy(models[family][1], outputs(layout, "torch_dist", family))


def test_whole_experts_are_divided_and_saved(outputs, models, saved):
    directory, model = models["qwen2-moe"]
    assert_greedy(model, outputs("expert-2", "torch_dist", "qwen2-moe"))
    shutil.copy(directory / "config.json", saved / "qwen2-moe")
    assert_greedy(model, run_alone(saved / "qwen2-moe"))


@pytest.mark.parametrize("family", [*SAVED_BY_FOUR, "llama-one-kv-head"])
def test_saved_by_one_rank_served_by_four(outputs, models, family):
    assert_greedy(models[family][1], outputs(FOUR, "torch_dist", family))


@pytest.mark.parametrize("family", SAVED_BY_FOUR)
def test_saved_by_four_ranks_served_by_one(outputs, models, saved, family):
    assert outputs(FOUR, "torch_dist", family)
    directory, model = models[family]
    shutil.copy(directory / "config.json", saved / family)
    assert_greedy(model, run_alone(saved / family))
