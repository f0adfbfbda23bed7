"""Token-for-token parity with transformers, in float32, over meshes of ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import MODELS, SMOLLM2, greedy, make_model, prompts

pytestmark = pytest.mark.distributed

MAX_TOKENS = 12
LAYOUTS = {
    "tensor-2": {"tensor": 2, "pipeline": 1},
    "pipeline-2": {"tensor": 1, "pipeline": 2},
    "pipeline-2-uneven": {"tensor": 1, "pipeline": 2, "layers_per_stage": [1, 2]},
    "tensor-2-pipeline-2": {"tensor": 2, "pipeline": 2},
}
CASES = [(layout, family) for layout in list(LAYOUTS)[:3] for family in MODELS]
# Each of the other families adds to the time of four ranks, and nothing to what they prove.
CASES += [("tensor-2-pipeline-2", family) for family in ("llama", "llama-one-kv-head", "gpt2")]
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
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(results.read_text())


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Family → (directory, expected tokens)."""
    made = {}
    for name in MODELS:
        directory = tmp_path_factory.mktemp(name)
        model = make_model(name, directory)
        made[name] = (directory, [greedy(model, prompt, MAX_TOKENS) for prompt in prompts()])
    return made


def job(directory: Path, layout: dict, **changes) -> dict:
    return {
        "model": str(directory),
        **layout,
        "block_size": 4,
        "device_blocks": 80,
        "chunk": 7,
        "prompts": prompts(),
        "max_tokens": MAX_TOKENS,
        **changes,
    }


@pytest.fixture(scope="module")
def outputs(models, tmp_path_factory):
    """Layout/family → tokens."""
    jobs = {2: {}, 4: {}}
    for layout, family in CASES:
        settings = LAYOUTS[layout]
        ranks = settings["tensor"] * settings["pipeline"]
        jobs[ranks][f"{layout}/{family}"] = job(models[family][0], settings)
    if SMOLLM2.is_dir():
        layout = {**LAYOUTS["pipeline-2"], "layers_per_stage": [14, 16]}
        jobs[2]["smollm2"] = job(
            SMOLLM2, layout, prompts=ENGLISH, chunk=16, block_size=16, max_tokens=8
        )
    results = {}
    for ranks, some in jobs.items():
        results |= mpirun(ranks, some, tmp_path_factory.mktemp(f"{ranks}-ranks"))
    return results


@pytest.mark.parametrize(("layout", "family"), CASES)
def test_greedy_tokens_equal_transformers(outputs, models, layout, family):
    assert outputs[f"{layout}/{family}"] == models[family][1]


@pytest.mark.model
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason=f"{SMOLLM2} is missing (make model)")
def test_smollm2_over_two_stages_equals_transformers(outputs):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype="float32").eval()
    assert outputs["smollm2"] == [greedy(model, text, 8) for text in ENGLISH]
