"""The scripts in launch/ keep their ranks up, as `serve` does."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from fake_server import expected_tokens

from fastserve_mega.client import Client
from fastserve_mega.drill.processes import named_processes
from fastserve_mega.process_tree import descendants, is_running
from fastserve_mega.types import SamplingParams

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's"),
]
PROMPT, COUNT, WAIT_S = [1, 2, 3], 400, 120.0


@pytest.fixture
def environment():
    foreign = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "OMPI_", "PMI", "SLURM_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    faults = {"FASTSERVE_MEGA_FAULTS": "rank.before_step:delay=0.005"}
    return {**kept, **faults, "PATH": path, "PYTHONPATH": str(ROOT), "ARGUMENTS": "--runner fake"}


@pytest.mark.parametrize(
    "script", ["mpirun_openmpi.sh", pytest.param("torchrun.sh", marks=pytest.mark.slow)]
)
def test_a_stream_goes_on_when_a_rank_is_killed(script, model_directory, environment, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        endpoint = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    plain = {
        "model": {"path": str(model_directory)},
        "parallel": {"pipeline": 2, "device": "cpu"},
        "kv_cache": {"device_blocks": 100},
        "coordinator": {"client_endpoint": endpoint},
    }
    (path := tmp_path / "config.yaml").write_text(yaml.safe_dump(plain))
    command = [str(ROOT / "launch" / script), str(path)]
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        try:
            with Client(endpoint, timeout_s=WAIT_S) as client:
                params = SamplingParams(max_tokens=COUNT, temperature=0.0, ignore_eos=True)
                generation = client.submit(PROMPT, params)
                next(iter(generation))
                os.kill(named_processes(process.pid)["rank 1"], signal.SIGKILL)
                assert generation.wait().token_ids == expected_tokens(PROMPT, COUNT)
            everyone = descendants(process.pid)
            process.terminate()
            assert process.wait(WAIT_S) == 0
            deadline = time.monotonic() + WAIT_S
            while any(map(is_running, everyone)):
                assert time.monotonic() < deadline, "processes are left"
        finally:
            for process_id in descendants(process.pid) | {process.pid}:
                if is_running(process_id):
                    os.kill(process_id, signal.SIGKILL)
