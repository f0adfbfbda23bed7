"""Runs the HTTP server."""

from __future__ import annotations

import signal

import uvicorn

from fastserve_mega.client import AsyncClient
from fastserve_mega.config import Config
from fastserve_mega.server.app import create_app
from fastserve_mega.text.tokenizer import Tokenizer

_DRAIN_TIMEOUT_S = 30
"""How long answers on their way may take after a request to stop."""


def run_server(config: Config) -> int:
    """Serve HTTP until SIGTERM or SIGINT, finish open answers within 30 s, and return 0.

    The coordinator need not be there yet: until it is, requests are answered with status 503.

    Raises:
        FileNotFoundError, ValueError: the model's directory has no tokenizer.
        SystemExit: the address is taken; uvicorn has logged why.
    """
    tokenizer = Tokenizer(config.model.directory)
    client = AsyncClient(config.coordinator.client_endpoint, tokenizer)
    # uvicorn takes these signals, drains, and raises them once more for the handlers before it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    uvicorn.run(
        create_app(client, tokenizer),
        host=config.server.host,
        port=config.server.port,
        access_log=False,
        log_config=None,  # as the command line has set it up
        ws="none",
        timeout_graceful_shutdown=_DRAIN_TIMEOUT_S,
    )
    return 0
