"""A real HTTP server in front of a coordinator, on a thread of the test."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from fastserve_mega.client import AsyncClient
from fastserve_mega.client.testing import WAIT_S
from fastserve_mega.server.app import create_app
from fastserve_mega.text.tokenizer import Tokenizer

TEXT = "the quick brown fox 日本 🙂"


def hi(role="user", content="hi"):
    """The shortest conversation."""
    return [{"role": role, "content": content}]


@contextmanager
def serving(
    coordinator, tokenizer: Tokenizer, *, patience_s: float = WAIT_S, **options
) -> Iterator[str]:
    """Address of a real HTTP server in front of a coordinator; options are `create_app`'s."""
    client = AsyncClient(
        coordinator.endpoint,
        tokenizer,
        timeout_s=patience_s,
        heartbeat_s=0.2,
        silence_timeout_s=patience_s,
    )
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        create_app(client, tokenizer, health_timeout_s=patience_s / 3, **options),
        log_level="error",
        ws="none",
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join(WAIT_S)
    listening.close()
