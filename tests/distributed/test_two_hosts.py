"""Ranks on two hosts and a client on a third one; network namespaces stand in for the hosts."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from launching import BIN, OPEN_MPI, ROOT, Launch, environment, worker, write_config
from tiny_models import greedy, make_model, prompts

pytestmark = pytest.mark.distributed

TOOL = str(ROOT / "tools/two_hosts.sh")
ENDPOINT = "tcp://10.77.0.1:5672"
MAX_TOKENS = 8
SILENCE_S = 4
START_S = 60
HERE = Path(__file__).parent


def why_not() -> str:
    """Empty where namespaces can be made."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "needs iproute2 and util-linux (apt-get install iproute2)"
    if shutil.which("mpirun", path=environment()["PATH"]) is None:
        return "needs mpirun of Open MPI"
    probe = subprocess.run(
        ["ip", "netns", "add", "fastserve-probe"], capture_output=True, text=True, check=False
    )
    subprocess.run(["ip", "netns", "del", "fastserve-probe"], capture_output=True, check=False)
    return f"no network namespaces here: {probe.stderr.strip()}" if probe.returncode else ""


@pytest.fixture(scope="module")
def hosts():
    if reason := why_not():
        pytest.skip(reason)
    subprocess.run([TOOL, "up"], check=True)
    yield
    for name in "abc":
        for pid in processes(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
    subprocess.run([TOOL, "down"], check=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory, and the tokens that transformers generates with it."""
    directory = tmp_path_factory.mktemp("llama")
    reference = make_model("llama", directory)
    return directory, [greedy(reference, prompt, MAX_TOKENS) for prompt in prompts()]


def on(host: str, *command: str) -> list[str]:
    return [TOOL, "on", host, *command]


def processes(host: str) -> list[int]:
    found = subprocess.run(
        ["ip", "netns", "pids", f"fastserve-{host}"], capture_output=True, text=True, check=True
    )
    return [int(pid) for pid in found.stdout.split()]


def ask(patience_s: float) -> dict:
    """From the third host."""
    arguments = [ENDPOINT, json.dumps(prompts()), str(MAX_TOKENS), str(patience_s)]
    command = on("c", str(BIN / "python"), str(HERE / "ask.py"), *arguments)
    done = subprocess.run(
        command,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=patience_s + 60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def with_mpirun(config: Path, logs: Path) -> list[Launch]:
    hosts = ["--prtemca", "plm_ssh_agent", f"{TOOL} ssh", "--host", "host-a,host-b", "-n", "2"]
    exported = ["-x", "PATH", "-x", "PYTHONPATH", "-x", "OMP_NUM_THREADS"]
    return [
        Launch(on("a", *OPEN_MPI, *hosts, *exported, "python", *worker(config)), logs / "mpirun")
    ]


def with_torchrun(config: Path, logs: Path) -> list[Launch]:
    meeting = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "10.77.0.1"]
    meeting += ["--master-port", "29533"]
    return [
        Launch(
            on(host, "torchrun", *meeting, "--node-rank", str(number), *worker(config)),
            logs / f"torchrun-{host}",
        )
        for number, host in enumerate("ab")
    ]


@pytest.mark.parametrize("start", [with_mpirun, with_torchrun])
def test_two_hosts_serve_and_end_when_the_cable_is_pulled(hosts, model, tmp_path, start):
    directory, expected = model
    config = write_config(
        tmp_path / "config.yaml",
        directory,
        parallel={"timeout_s": SILENCE_S},
        coordinator={"client_endpoint": ENDPOINT, "step_timeout_s": SILENCE_S},
    )
    with ExitStack() as stack:
        launches = [stack.enter_context(launch) for launch in start(config, tmp_path)]
        try:
            assert ask(START_S) == {"tokens": expected}
            subprocess.run([TOOL, "cut", "b"], check=True)
            begin = time.monotonic()
            error = ask(0)["error"]
            told_s = time.monotonic() - begin
            await_end(begin + 30)
            ended_s = time.monotonic() - begin
        finally:
            subprocess.run([TOOL, "plug", "b"], check=True)
            print(*(launch.output for launch in launches))
        assert all(launch.wait(10).status != 0 for launch in launches)
    print(f"{start.__name__}: client told after {told_s:.1f} s ({error}), all over {ended_s:.1f} s")
    assert "step" in error or "rank 1" in error
    assert "Traceback" not in ours(launches)


def await_end(deadline: float) -> None:
    while left := [*processes("a"), *processes("b")]:
        assert time.monotonic() < deadline, f"processes {left} do not end"
        time.sleep(0.1)


def ours(launches: list[Launch]) -> str:
    """What our processes said; torchrun ends with a traceback of its own."""
    text = "\n".join(launch.output for launch in launches)
    return "\n".join(line for line in text.splitlines() if "torch/distributed/" not in line)
