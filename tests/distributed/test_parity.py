"""Token-for-token parity with transformers, in float32, over meshes of ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from tiny_models import MIXTURES, MODELS, SMOLLM2, greedy_after_each, make_model, prompts

pytestmark = pytest.mark.distributed

MAX_TOKENS = 32
LAYOUTS = {
    "tensor-2": {"tensor": 2, "pipeline": 1},
    "pipeline-2": {"tensor": 1, "pipeline": 2},
    "pipeline-2-uneven": {"tensor": 1, "pipeline": 2, "layers_per_stage": [1, 2]},
    "expert-2": {"tensor": 2, "pipeline": 1, "expert": 2},
    "tensor-2-pipeline-2": {"tensor": 2, "pipeline": 2},
    "expert-2-pipeline-2": {"tensor": 2, "pipeline": 2, "expert": 2},
    "tensor-4-expert-2": {"tensor": 4, "pipeline": 1, "expert": 2},
}
# What differs in nothing that ranks divide is left to the tests of a single rank.
DIVIDED = [family for family in MODELS if family not in {"llama-scaled", "qwen3-yarn"}]
CASES = [(layout, family) for layout in ("tensor-2", "pipeline-2-uneven") for family in DIVIDED]
CASES += [("expert-2", family) for family in MIXTURES] + [("pipeline-2", "qwen2-moe")]
# Each of the other families adds to the time of four ranks, and little to what they prove.
CASES += [("tensor-2-pipeline-2", "llama-one-kv-head"), ("tensor-2-pipeline-2", "gpt2")]
CASES += [("expert-2-pipeline-2", "qwen3-moe"), ("tensor-4-expert-2", "qwen2-moe")]
SLOW = [("tensor-2-pipeline-2", family) for family in DIVIDED]
SLOW = [case for case in SLOW if case not in CASES]
SMOLLM2_LAYOUTS = {
    "pipeline-2": {"tensor": 1, "pipeline": 2, "layers_per_stage": [14, 16]},
    "pipeline-3": {"tensor": 1, "pipeline": 3},
    "tensor-3": {"tensor": 3, "pipeline": 1},
}
ENGLISH = [[504, 3575, 282, 4649, 314], list(range(300, 340))]
HERE = Path(__file__).parent


def mpirun(ranks: int, jobs: dict, directory: Path) -> dict:
    """Run all jobs in one launch: starting the ranks takes longer than the jobs."""
    scenario, results = directory / "scenario.json", directory / "results.json"
    scenario.write_text(json.dumps(jobs))
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
    command += ["-n", str(ranks), sys.executable, str(HERE / "rank.py")]
    path = os.pathsep.join([str(HERE.parent), str(HERE.parent.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(scenario), str(results)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(results.read_text())


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Family → (directory, transformers model)."""
    directories = {name: tmp_path_factory.mktemp(name) for name in MODELS}
    return {name: (path, make_model(name, path)) for name, path in directories.items()}


def job(directory: Path, layout: dict, **changes) -> dict:
    return {
        "model": str(directory),
        **layout,
        "block_size": 4,
        "device_blocks": 80,
        "chunk": 7,
        "concurrent": 6,
        "prompts": prompts(),
        "max_tokens": MAX_TOKENS,
        **changes,
    }


@pytest.fixture(scope="module")
def outputs(models, tmp_path_factory):
    """Tokens by layout and family; all cases of a number of ranks share one launch.

    The slow ones have a launch of their own, which only starts where they are selected.
    """
    launches = defaultdict(dict)
    for layout, family in CASES + SLOW:
        settings = LAYOUTS[layout]
        launch = (ranks_of(settings), (layout, family) in SLOW)
        launches[launch][layout, family] = job(models[family][0], settings)
    if SMOLLM2.is_dir():
        for layout, settings in SMOLLM2_LAYOUTS.items():
            launches[ranks_of(settings), False][layout, "smollm2"] = job(
                SMOLLM2, settings, prompts=ENGLISH, chunk=16, block_size=16, max_tokens=8
            )
    results = {}

    def get(*case):
        if case not in results:
            ((ranks, _), jobs) = next(item for item in launches.items() if case in item[1])
            named = {"/".join(case): work for case, work in jobs.items()}
            done = mpirun(ranks, named, tmp_path_factory.mktemp(f"{ranks}-ranks"))
            results.update({case: done["/".join(case)] for case in jobs})
        return results[case]

    return get


def ranks_of(layout):
    return layout["tensor"] * layout["pipeline"]


@pytest.mark.parametrize(
    ("layout", "family"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_greedy_tokens_equal_transformers(outputs, models, layout, family):
    assert_greedy(models[family][1], prompts(), outputs(layout, family), MAX_TOKENS)


def assert_greedy(model, some_prompts, outputs, max_tokens):
    for prompt, output in zip(some_prompts, outputs, strict=True):
        assert len(output) == max_tokens
        assert output == greedy_after_each(model, prompt, output)


@pytest.fixture(scope="module")
def smollm2():
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype="float32").eval()


@pytest.mark.model
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason=f"{SMOLLM2} is missing (make model)")
@pytest.mark.parametrize("layout", SMOLLM2_LAYOUTS)
def test_smollm2_equals_transformers(outputs, smollm2, layout):
    assert_greedy(smollm2, ENGLISH, outputs(layout, "smollm2"), 8)
