"""The commands under "Use it" in the README, as a new user pastes them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.model, pytest.mark.distributed]
ROOT = Path(__file__).parents[2]
PORTS = (8000, 5570)
START_S, COMMAND_S, STOP_S = 300, 200, 60


def blocks():
    """The `console` blocks of the section: the first one ends with the server."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    section = page.partition("## Use it\n")[2].partition("\n## ")[0]
    return re.findall(r"```console\n(.*?)```", section, re.DOTALL)


def shell(text, **options):
    """Runs in bash with this Python's commands first."""
    commands = text.replace(". .venv/bin/activate\n", "")  # these tests have a Python already
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=ROOT,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        **options,
    )


def is_taken(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def server(model_directory, tmp_path):
    """All of the first block, which ends with a server in the foreground."""
    if any(map(is_taken, PORTS)):
        pytest.skip(f"one of the README's ports {PORTS} is in use")
    log = tmp_path / "serve.log"
    with log.open("w") as output:
        process = shell(blocks()[0], stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_S
        while "Ctrl-C ends it." not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield log
        os.killpg(process.pid, signal.SIGINT)
        process.wait(STOP_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_every_command_works(server):
    client = shell(blocks()[1], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = client.communicate(timeout=COMMAND_S)
    assert client.returncode == 0, output
    assert '"finish_reason"' in output  # curl
    assert "output tokens/s" in output  # bench, top
    assert "KV blocks" in output  # top
    started = server.read_text()
    assert "0.13 billion parameters" in started  # plan
    assert "is being served" in started
