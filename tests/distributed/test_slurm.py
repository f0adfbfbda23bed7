"""launch/slurm.sbatch as it is, on a Slurm of this machine only."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import ROOT, environment, write_config
from tiny_models import greedy, make_model, prompts

pytestmark = pytest.mark.distributed

HERE = Path(__file__).parent
ENDPOINT = "tcp://127.0.0.1:5673"
MAX_TOKENS = 8
START_S = 90
PROGRAM = """
import json, sys
from fastserve_mega import LLM, SamplingParams
model, max_tokens, prompts = sys.argv[1:]
settings = ["model.dtype=float32", "kv_cache.device_blocks=64"]
params = SamplingParams(max_tokens=int(max_tokens), temperature=0.0, ignore_eos=True)
with LLM(model, tensor=2, settings=settings) as llm:
    print([each.token_ids for each in llm.generate(json.loads(prompts), params)])
"""


def why_not() -> str:
    """Empty where a cluster can be started."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    missing = [
        name
        for name in ("sbatch", "slurmctld", "slurmd", "munged")
        if shutil.which(name, path=path) is None
    ]
    if missing:
        return f"needs {', '.join(missing)} (apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "a Slurm of one's own needs root here"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """SLURM_CONF of a running cluster."""
    if reason := why_not():
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("slurm")
    script = str(HERE / "one_node_slurm.sh")
    # Daemons keep the output open, so it is not captured through a pipe.
    with (directory / "start.log").open("w") as log:
        started = subprocess.run(
            [script, "start", str(directory)], stdout=log, stderr=log, timeout=60, check=False
        )
    try:
        if started.returncode != 0:
            pytest.skip(f"Slurm does not start here: {(directory / 'start.log').read_text()}")
        yield str(directory / "slurm.conf")
    finally:
        subprocess.run([script, "stop", str(directory)], check=True)


def slurm(cluster: str, *command: str, timeout_s: float = 30, **variables: str) -> str:
    done = subprocess.run(
        command,
        env=environment(SLURM_CONF=cluster, **variables),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_batch_job_serves_and_is_cancelled(cluster, tmp_path):
    reference = make_model("llama", tmp_path / "llama")
    config = write_config(
        tmp_path / "config.yaml",
        tmp_path / "llama",
        parallel={"timeout_s": 60},
        coordinator={"client_endpoint": ENDPOINT},
    )
    log = tmp_path / "job.log"
    submitted = slurm(
        cluster,
        *("sbatch", f"--output={log}", str(ROOT / "launch/slurm.sbatch")),
        CONFIG=str(config),
    )
    job = submitted.split()[-1]
    try:
        client = subprocess.run(
            [sys.executable, str(HERE / "ask.py"), ENDPOINT, str(MAX_TOKENS), str(START_S)],
            env=environment(),
            input=json.dumps(prompts()),
            capture_output=True,
            text=True,
            timeout=START_S + 60,
            check=False,
        )
        assert client.returncode == 0, client.stderr + log.read_text()
        expected = [greedy(reference, prompt, MAX_TOKENS) for prompt in prompts()]
        assert json.loads(client.stdout) == {"tokens": expected}
    finally:
        slurm(cluster, "scancel", job)
    deadline = time.monotonic() + 40
    while slurm(cluster, "squeue", "--noheader"):
        assert time.monotonic() < deadline, "the job does not end"
        time.sleep(0.2)
    assert "Traceback" not in log.read_text()


def test_a_program_with_a_model_inside_runs_as_tasks(cluster, tmp_path):
    reference = make_model("llama", tmp_path / "llama")
    expected = [tuple(greedy(reference, prompt, MAX_TOKENS)) for prompt in prompts()]
    command = ("srun", "--ntasks=2", "--kill-on-bad-exit=1", sys.executable, "-c", PROGRAM)
    told = slurm(
        cluster,
        *command,
        *(str(tmp_path / "llama"), str(MAX_TOKENS), json.dumps(prompts())),
        timeout_s=START_S + 60,
    )
    assert told.strip() == str(expected)
