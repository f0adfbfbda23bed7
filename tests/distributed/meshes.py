"""Layouts of ranks, and launches that run many jobs each (rank.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tiny_models import prompts

LAYOUTS = {
    "tensor-2": {"tensor": 2, "pipeline": 1},
    "pipeline-2": {"tensor": 1, "pipeline": 2},
    "pipeline-2-uneven": {"tensor": 1, "pipeline": 2, "layers_per_stage": [1, 2]},
    "pipeline-3": {"tensor": 1, "pipeline": 3},
    "expert-2": {"tensor": 2, "pipeline": 1, "expert": 2},
    "tensor-2-pipeline-2": {"tensor": 2, "pipeline": 2},
    "expert-2-pipeline-2": {"tensor": 2, "pipeline": 2, "expert": 2},
    "tensor-4-expert-2": {"tensor": 4, "pipeline": 1, "expert": 2},
}
MAX_TOKENS = 32
LIMIT_S = 500
HERE = Path(__file__).parent


def num_ranks(layout: dict) -> int:
    return layout["tensor"] * layout["pipeline"]


def job(directory: Path, layout: dict, **changes) -> dict:
    """What a launch does with one model."""
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
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(results.read_text())
