"""`fastserve-mega profile` on fake ranks, and a server that starts from its file."""

import os
import signal
import subprocess
import sys
import time

import pytest
from fake_server import expected_tokens

from fastserve_mega.client import Client
from fastserve_mega.coordinator.event_log import read_event_log
from fastserve_mega.coordinator.profile_file import load_profile
from fastserve_mega.drill.processes import named_processes
from fastserve_mega.launcher import mpirun_command
from fastserve_mega.process_tree import descendants, is_running
from fastserve_mega.types import SamplingParams

CONFIG = """
model: {{path: {model}}}
parallel: {{device: cpu}}
kv_cache: {{block_size: 4, device_blocks: 65}}
scheduler: {{max_batch_size: 6, max_batch_tokens: 50}}
coordinator: {{client_endpoint: "tcp://127.0.0.1:0"}}
"""


@pytest.fixture
def config(model_directory, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(model=model_directory))
    return path


def fake_ranks(config, output, *arguments):
    """What `profile` starts, but with a runner that needs no weights."""
    command = ["worker", "--runner", "fake", "--config", str(config), "--profile-to", str(output)]
    return subprocess.run(
        [sys.executable, "-m", "fastserve_mega", *command, *arguments],
        capture_output=True, text=True, timeout=120, check=False,
        env={name: value for name, value in os.environ.items() if "OMPI" not in name},
    )  # fmt: skip


def test_a_profile_is_measured_and_served_from(start_server, config, tmp_path):
    output, log = tmp_path / "profile.json", tmp_path / "log.jsonl"
    done = fake_ranks(config, output)
    assert done.returncode == 0, done.stderr
    assert "measuring steps" in done.stderr
    assert "70/70" in done.stderr
    profile = load_profile(output)
    assert [point.tokens for point in profile.prefill] == [1, 2, 4, 8, 16, 32, 50]
    # 64 blocks of 4 tokens; one request may have 255 tokens before the one that is decoded.
    assert [(point.context, point.batch) for point in profile.decode] == [
        (16, 1), (16, 2), (16, 4), (16, 6), (128, 1)
    ]  # fmt: skip
    with (
        start_server(profile=str(output), coordinator={"event_log": str(log)}) as server,
        Client(server.endpoint) as client,
    ):
        answer = client.submit((1, 2, 3), SamplingParams(max_tokens=4, temperature=0.0))
        assert answer.wait().token_ids == expected_tokens((1, 2, 3), 4)
    assert read_event_log(log)[0].profile == profile


@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_no_rank_goes_on_when_mpirun_is_killed(config, tmp_path):
    ranks = [sys.executable, "-m", "fastserve_mega", "worker", "--runner", "fake"]
    ranks += ["--config", str(config), "--set", "parallel.pipeline=2"]
    slow = {**os.environ, "FASTSERVE_MEGA_FAULTS": "rank.before_step:delay=0.4"}
    with subprocess.Popen(
        [*mpirun_command(2), *ranks, "--profile-to", str(tmp_path / "profile.json")],
        env=slow,
    ) as mpirun:  # fmt: skip
        deadline = time.monotonic() + 60
        while "coordinator" not in named_processes(mpirun.pid):
            assert time.monotonic() < deadline, "the coordinator does not start"
        everyone = descendants(mpirun.pid)
        mpirun.kill()
    deadline = time.monotonic() + 20  # the profile would take two minutes
    while left := set(filter(is_running, everyone)):
        if time.monotonic() > deadline:
            for process_id in left:
                os.kill(process_id, signal.SIGKILL)
            pytest.fail(f"{len(left)} processes are left")
        time.sleep(0.01)


def test_errors_are_one_sentence(config, tmp_path):
    done = fake_ranks(config, tmp_path / "missing" / "profile.json")
    assert done.returncode != 0
    assert "No such file or directory" in done.stderr
    assert "Traceback" not in done.stderr
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    done = fake_ranks(config, tmp_path / "out.json", "--set", f"scheduler.profile={bad}")
    assert done.returncode != 0
    assert f"{bad}: Object missing required field `prefill`" in done.stderr
