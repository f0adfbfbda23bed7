"""The client in another language, examples/node_client.mjs, against servers without a model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import zmq
from fake_server import WAIT_MS, expected_tokens

from fastserve_mega.client.testing import answer, begin
from fastserve_mega.messaging.messages import Submit

EXAMPLE = Path(__file__).parents[2] / "examples" / "node_client.mjs"
WAIT_S = WAIT_MS / 1000
INSTALL_S = 120
PROMPT = (5, 6, 7)


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """The example beside its packages."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("there is no node or no npm")
    directory = tmp_path_factory.mktemp("node")
    install = ["npm", "install", "--no-audit", "--no-fund", "zeromq@6", "@msgpack/msgpack@3"]
    try:
        subprocess.run(install, cwd=directory, capture_output=True, timeout=INSTALL_S, check=True)
    except subprocess.SubprocessError as error:
        pytest.skip(f"npm cannot install zeromq and @msgpack/msgpack: {error}")
    return shutil.copy(EXAMPLE, directory)


def command(script, server, *words):
    prompt = ",".join(map(str, PROMPT))
    return ["node", str(script), server.endpoint, prompt, *map(str, words)]


def run(script, server, *words):
    line = command(script, server, *words)
    return subprocess.run(line, capture_output=True, text=True, timeout=WAIT_S, check=False)


def events(done):
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_it_streams_the_tokens(script, start_server):
    with start_server() as server:
        welcome, *pieces, finished = events(run(script, server, 20))
    assert welcome["max_context"] == 512
    assert len(pieces) > 1
    tokens = tuple(token for piece in pieces for token in piece["tokens"])
    assert tokens == expected_tokens(PROMPT, 20)
    assert finished["reason"] == "length"
    assert finished["usage"]["completion_tokens"] == 20


def test_it_cancels(script, start_server):
    with start_server() as server:
        *_, finished = events(run(script, server, 500, 5))
    assert finished["reason"] == "abort"
    assert 5 <= finished["usage"]["completion_tokens"] < 500


def test_it_says_why_it_was_refused(script, start_server):
    with start_server() as server:
        done = run(script, server, 10_000)
    assert done.returncode == 1
    assert "10000" in done.stderr
    assert done.stderr.count("\n") == 1


def test_it_says_that_the_server_speaks_another_version(script):
    router = zmq.Context.instance().socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    line = ["node", str(script), f"tcp://127.0.0.1:{port}", "1,2", "3"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as node:
        peer, _ = router.recv_multipart()
        router.send_multipart((peer, b"\x01\x23\x80"))
        _, said = node.communicate(timeout=WAIT_S)
    router.close(linger=0)
    assert node.returncode == 1
    assert said == "the server speaks protocol version 1, not 2\n"


def test_it_goes_on_after_a_restart(script, fake_coordinator):
    fake_coordinator.behaviour = begin([5, 6])
    line = command(script, fake_coordinator, 4)
    environment = {**os.environ, "PING_MS": "50"}
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment) as client:
        lines = [client.stdout.readline() for _ in range(3)]
        fake_coordinator.behaviour = answer([5, 6, 7, 8])
        fake_coordinator.restart()
        _, again = fake_coordinator.wait_for(Submit, 2)
        rest, _ = client.communicate(timeout=WAIT_S)
    assert again.received == (5, 6)
    said = [json.loads(line) for line in [*lines, *rest.splitlines()]]
    assert [piece["tokens"] for piece in said[1:-1]] == [[5], [6], [7], [8]]
    assert said[-1]["reason"] == "length"
