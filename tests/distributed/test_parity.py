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
        "params": {"max_tokens": MAX_TOKENS, "temperature": 0.0},
        **changes,
    }


def run_layouts(ranks, models, directory):
    jobs = {
        f"{layout}/{family}": job(model_directory, settings)
        for layout, settings in LAYOUTS.items()
        for family, (model_directory, _) in models.items()
        if settings["tensor"] * settings["pipeline"] == ranks
    }
    return mpirun(ranks, jobs, directory)


@pytest.fixture(scope="module")
def outputs(models, tmp_path_factory):
    return {
        **run_layouts(2, models, tmp_path_factory.mktemp("two-ranks")),
        **run_layouts(4, models, tmp_path_factory.mktemp("four-ranks")),
    }


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_greedy_tokens_equal_transformers(outputs, models, layout, family):
    assert outputs[f"{layout}/{family}"] == models[family][1]


@pytest.mark.model
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason=f"{SMOLLM2} is missing (make model)")
def test_smollm2_over_two_stages_equals_transformers(tmp_path):
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype="float32").eval()
    texts = ([504, 3575, 282, 4649, 314], list(range(300, 340)))
    expected = [greedy(model, text, 8) for text in texts]
    layout = {**LAYOUTS["pipeline-2"], "layers_per_stage": [14, 16]}
    settings = job(SMOLLM2, layout, prompts=texts, chunk=16, block_size=16)
    settings["params"]["max_tokens"] = 8
    assert mpirun(2, {"smollm2": settings}, tmp_path)["smollm2"] == expected
