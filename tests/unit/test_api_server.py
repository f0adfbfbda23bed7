from __future__ import annotations

import signal
import socket
import subprocess
import sys

import httpx

from fastserve_mega.client.testing import WAIT_S

PROGRAM = """
import sys
from fastserve_mega.records import convert
from fastserve_mega.system.config import Config
from fastserve_mega.server.api_server import run_server
directory, endpoint, port = sys.argv[1:]
raw = {
    "model": {"path": directory, "max_context": 256},
    "coordinator": {"client_endpoint": endpoint},
    "server": {"port": int(port)},
}
sys.exit(run_server(convert(raw, Config)))
"""


def test_it_serves_until_sigterm_and_exits_with_0(fake_coordinator, tiny_tokenizer_dir):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = [str(tiny_tokenizer_dir), fake_coordinator.endpoint, str(port)]
    server = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments], stderr=subprocess.PIPE, text=True
    )
    try:
        # It connects again, with growing pauses, until the server listens.
        transport = httpx.HTTPTransport(retries=8)
        with httpx.Client(transport=transport, timeout=WAIT_S) as http:
            reply = http.get(f"http://127.0.0.1:{port}/v1/models")
        assert reply.json()["data"][0]["id"] == "tiny"
        server.send_signal(signal.SIGTERM)
        _, log = server.communicate(timeout=WAIT_S)
    finally:
        server.kill()
    assert server.returncode == 0
    assert "Traceback" not in log
