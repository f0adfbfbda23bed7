"""The examples and the README's commands do what they say, against fake ranks."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from fake_server import WAIT_MS

from fastserve_mega.client import AsyncClient
from fastserve_mega.server.app import create_app
from fastserve_mega.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
WAIT_S = WAIT_MS / 1000


@contextmanager
def http_server(endpoint, directory):
    """Its port; connections wait in the backlog until it serves."""
    tokenizer = Tokenizer(directory)
    app = create_app(AsyncClient(endpoint, tokenizer), tokenizer)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(WAIT_S)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def addresses(model_directory):
    """Of one server, for all examples: (ZeroMQ endpoint, HTTP host and port)."""
    from fake_server import fake_server

    with (
        fake_server(model_directory) as server,
        http_server(server.endpoint, model_directory) as port,
    ):
        yield server.endpoint, f"127.0.0.1:{port}"


def moved(text, addresses):
    """The same with this server's addresses."""
    endpoint, http = addresses
    return text.replace("tcp://127.0.0.1:5570", endpoint).replace("127.0.0.1:8000", http)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example(example, addresses):
    source = example.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 20
    done = subprocess.run(
        [sys.executable, "-c", moved(source, addresses)],
        capture_output=True, text=True, timeout=WAIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert len(done.stdout) > 20
    if example.name == "cancel.py":
        (tokens,) = re.findall(r"\[abort after (\d+) tokens\]", done.stdout)
        assert 20 <= int(tokens) < 400


def console_lines(page):
    """Commands in the `console` blocks of a page."""
    for block in re.findall(r"```console\n(.*?)```", page, re.DOTALL):
        yield from block.replace("\\\n", " ").splitlines()


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl_in_the_readme(addresses):
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = [each for each in console_lines(page) if each.startswith("curl ")]
    done = subprocess.run(
        ["bash", "-c", moved(line, addresses)],
        capture_output=True, text=True, timeout=WAIT_S, check=True,
    )  # fmt: skip
    assert '"finish_reason":"length"' in done.stdout.replace(" ", ""), done.stdout


def test_python_in_the_readme(addresses):
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", moved(source, addresses)],
        capture_output=True, text=True, timeout=WAIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout
