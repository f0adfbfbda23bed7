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
SILENCE_S = 8
START_S = 180
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
def model(tmp_path_factory, tiny_tokenizer_dir):
    """A directory, and the tokens that transformers generates with it."""
    directory = tmp_path_factory.mktemp("llama")
    shutil.copytree(tiny_tokenizer_dir, directory, dirs_exist_ok=True)
    reference = make_model("llama", directory)
    return directory, [greedy(reference, prompt, MAX_TOKENS) for prompt in prompts()]


def on(host: str, *command: str) -> list[str]:
    return [TOOL, "on", host, *command]


def processes(host: str) -> list[int]:
    found = subprocess.run(
        ["ip", "netns", "pids", f"fastserve-{host}"], capture_output=True, text=True, check=True
    )
    return [int(pid) for pid in found.stdout.split()]


class Asker:
    """A client on the third host."""

    def __init__(self) -> None:
        script = [
            str(BIN / "python"),
            str(HERE / "ask.py"),
            ENDPOINT,
            str(MAX_TOKENS),
            str(START_S),
        ]
        self.process = subprocess.Popen(
            on("c", *script),
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self) -> dict:
        self.process.stdin.write(json.dumps(prompts()) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the client ended"
        return json.loads(line)


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
        client = stack.enter_context(Asker())
        try:
            assert client.ask() == {"tokens": expected}
            subprocess.run([TOOL, "cut", "b"], check=True)
            begin = time.monotonic()
            error = client.ask()["error"]
            told_s = time.monotonic() - begin
            await_end(begin + 120)
            ended_s = time.monotonic() - begin
        finally:
            subprocess.run([TOOL, "plug", "b"], check=True)
            print(*(launch.output for launch in launches))
        for launch in launches:
            launch.process.terminate()
        assert all(launch.wait(60).status != 0 for launch in launches)
    print(f"{start.__name__}: client told after {told_s:.1f} s ({error}), all over {ended_s:.1f} s")
    assert "step" in error or "rank 1" in error
    assert not any("fastserve_mega/worker" in launch.output for launch in launches)  # no traceback


def await_end(deadline: float) -> None:
    """Of all ranks, coordinators and agents of torchrun.

    mpirun and its daemon on the other host wait for each other until TCP gives up.
    """
    while left := [pid for host in "ab" for pid in processes(host) if is_python(pid)]:
        assert time.monotonic() < deadline, f"processes {left} do not end"
        time.sleep(0.1)


def is_python(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().startswith(("python", "torchrun"))
    except OSError:
        return False
