"""Runs the HTTP server."""

from __future__ import annotations

import logging
import signal
from pathlib import Path

import uvicorn

from fastserve_mega.client import AsyncClient
from fastserve_mega.models.architecture import load_architecture
from fastserve_mega.server.app import create_app
from fastserve_mega.server.connections import FewWarnings, bounded_connections, most_connections
from fastserve_mega.server.middleware import body_limit
from fastserve_mega.system.config import Config
from fastserve_mega.text.tokenizer import Tokenizer

_DRAIN_TIMEOUT_S = 30
"""How long answers on their way may take after a request to stop."""


def run_server(config: Config) -> int:
    """Serve HTTP until SIGTERM or SIGINT, finish open answers within 30 s, and return 0.

    The coordinator need not be there yet: until it is, requests are answered with status 503.

    Raises:
        FileNotFoundError, ValueError: the model's directory has no tokenizer, or no config.json.
        OSError, ValueError: the file of keys cannot be read, or has none.
        SystemExit: the address is taken; uvicorn has logged why.
    """
    tokenizer = Tokenizer(config.model.directory)
    client = AsyncClient(config.coordinator.client_endpoint, tokenizer)
    # uvicorn takes these signals, drains, and raises them once more for the handlers before it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    app = create_app(
        client,
        tokenizer,
        tool_parser=config.server.tool_parser,
        live_view=config.server.live_view,
        api_keys=_read_keys(config.server.api_key_file),
        cors_origins=config.server.cors_origins,
        stopping=lambda: server.should_exit,
        max_body_bytes=config.server.max_body_bytes or body_limit(_max_context(config)),
    )
    logging.getLogger("uvicorn.error").addFilter(FewWarnings())
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http=bounded_connections(config.server.max_connections or most_connections()),
            host=config.server.host,
            port=config.server.port,
            access_log=False,
            log_config=None,  # as the command line has set it up
            ws="none",
            timeout_graceful_shutdown=_DRAIN_TIMEOUT_S,
        )
    )
    server.run()
    return 0


def _max_context(config: Config) -> int:
    return config.model.max_context or load_architecture(config.model.directory).max_context


def _read_keys(path: str | None) -> tuple[str, ...]:
    if path is None:
        return ()
    lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys:
        raise ValueError(f"{path} has no key (server.api_key_file)")
    return keys
