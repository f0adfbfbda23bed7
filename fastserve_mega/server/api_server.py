"""Runs the HTTP server."""

from __future__ import annotations

import asyncio
import math
import signal
import socket
from pathlib import Path

import uvicorn

from fastserve_mega.client import AsyncClient
from fastserve_mega.server.app import create_app
from fastserve_mega.system.config import Config
from fastserve_mega.text.tokenizer import Tokenizer

_LAST_WORDS_S = 1.0
"""How long after the drain timeout a coordinator that drains as well may tell why it ends."""
_WRITE_S = 2.0
"""How long the last words may take to reach the clients."""


class _Server(uvicorn.Server):
    """Ends the answers that are on their way when the time for them is over."""

    def __init__(self, config: uvicorn.Config, client: AsyncClient, drain_s: float) -> None:
        super().__init__(config)
        self._client = client
        self._drain_s = drain_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, and wait for open answers; whoever still waits then is told why."""
        ending = asyncio.create_task(self._end_answers())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_answers(self) -> None:
        await asyncio.sleep(self._drain_s + _LAST_WORDS_S)
        self._client.give_up("the server was shut down")


def run_server(config: Config, listener: socket.socket | None = None) -> int:
    """Serve HTTP until SIGTERM or SIGINT, give open answers the drain timeout, and return 0.

    The coordinator need not be there yet: until it is, requests are answered with status 503.

    Args:
        config: of the deployment.
        listener: where connections come from; None listens at the address of the configuration.

    Raises:
        FileNotFoundError, ValueError: the model's directory has no tokenizer.
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
    )
    drain_s = config.coordinator.drain_timeout_s
    server = _Server(
        uvicorn.Config(
            app,
            host=config.server.host,
            port=config.server.port,
            access_log=False,
            log_config=None,  # as the command line has set it up
            ws="none",
            timeout_graceful_shutdown=math.ceil(drain_s + _LAST_WORDS_S + _WRITE_S),
        ),
        client,
        drain_s,
    )
    server.run(None if listener is None else [listener])
    return 0


def _read_keys(path: str | None) -> tuple[str, ...]:
    if path is None:
        return ()
    lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys:
        raise ValueError(f"{path} has no key (server.api_key_file)")
    return keys
