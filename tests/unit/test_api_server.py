from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys

import httpx

from fastserve_mega.client.testing import WAIT_S, begin
from fastserve_mega.messaging.messages import Cancel, Submit

PROGRAM = """
import sys
from fastserve_mega.records import convert
from fastserve_mega.system.config import Config
from fastserve_mega.server.api_server import run_server
directory, endpoint, port = sys.argv[1:]
raw = {
    "model": {"path": directory, "max_context": 256},
    "coordinator": {"client_endpoint": endpoint, "drain_timeout_s": 0.05},
    "server": {"port": int(port)},
}
sys.exit(run_server(convert(raw, Config)))
"""


TOLD_TO_STOP = """
import signal
from fastserve_mega.server import api_server
def create_app(*_, **__):
    signal.raise_signal(signal.SIGTERM)
    raise AssertionError("it goes on")
api_server.create_app = create_app
"""
"""While it starts."""


@contextlib.contextmanager
def running(endpoint, directory, before=""):
    """The process, and an HTTP client that waits until it listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-c", before + PROGRAM, str(directory), endpoint, str(port)],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        # It connects again, with growing pauses, until the server listens.
        transport = httpx.HTTPTransport(retries=8)
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(transport=transport, timeout=WAIT_S, base_url=url) as http:
            yield server, http
    finally:
        server.kill()


def test_it_serves_until_sigterm_and_exits_with_0(fake_coordinator, tiny_tokenizer_dir):
    with running(fake_coordinator.endpoint, tiny_tokenizer_dir) as (server, http):
        assert http.get("/v1/models").json()["data"][0]["id"] == "tiny"
        server.send_signal(signal.SIGTERM)
        _, log = server.communicate(timeout=WAIT_S)
    assert server.returncode == 0
    assert "Traceback" not in log


def test_sigterm_while_it_starts_ends_it_at_once(fake_coordinator, tiny_tokenizer_dir):
    with running(fake_coordinator.endpoint, tiny_tokenizer_dir, TOLD_TO_STOP) as (server, _):
        _, log = server.communicate(timeout=WAIT_S)
    assert (server.returncode, log) == (0, "")


def test_the_models_own_sampling_defaults_are_used(fake_coordinator, tiny_tokenizer_dir, tmp_path):
    directory = shutil.copytree(tiny_tokenizer_dir, tmp_path / "model")
    (directory / "generation_config.json").write_text('{"temperature": 0.25, "top_k": 7}')
    with running(fake_coordinator.endpoint, directory) as (server, http):
        http.post("/v1/completions", json={"prompt": "x", "top_k": 9}).raise_for_status()
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=WAIT_S)
    (submit,) = fake_coordinator.received(Submit)
    assert (submit.params.temperature, submit.params.top_k) == (0.25, 9)


def test_a_stream_that_outlasts_the_drain_timeout_is_told_the_end(
    fake_coordinator, tiny_tokenizer_dir
):
    fake_coordinator.behaviour = begin([5, 6])
    body = {"prompt": [1, 2], "max_tokens": 50, "stream": True}
    with running(fake_coordinator.endpoint, tiny_tokenizer_dir) as (server, http):
        with http.stream("POST", "/v1/completions", json=body) as response:
            lines = (line.removeprefix("data: ") for line in response.iter_lines() if line)
            next(lines)
            server.send_signal(signal.SIGTERM)
            *_, last, done = lines
        _, log = server.communicate(timeout=WAIT_S)
    assert json.loads(last)["error"]["message"] == "the server was shut down"
    assert done == "[DONE]"
    assert fake_coordinator.wait_for(Cancel)
    assert server.returncode == 0
    assert "Traceback" not in log
