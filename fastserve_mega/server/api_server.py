"""Runs the HTTP server."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from fastserve_mega.client import AsyncClient
from fastserve_mega.models.architecture import load_architecture
from fastserve_mega.models.generation_config import (
    NO_DEFAULTS,
    SamplingDefaults,
    load_sampling_defaults,
)
from fastserve_mega.server.api_keys import ApiKeys
from fastserve_mega.server.app import create_app
from fastserve_mega.server.connections import (
    ACCEPTED_AT_ONCE,
    FewWarnings,
    allow_connections,
    bounded_connections,
)
from fastserve_mega.server.middleware import body_limit
from fastserve_mega.system.config import Config
from fastserve_mega.system.key_file import client_address
from fastserve_mega.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from fastserve_mega.server.tracing import Tracing

_log = logging.getLogger(__name__)
_LAST_WORDS_S = 1.0
"""How long after the drain timeout a coordinator that drains as well may tell why it ends."""
_WRITE_S = 2.0
"""How long the last words may take to reach the clients."""
_COLLECTORS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_BACKLOG = 2048
"""Connections that wait in the kernel until they are accepted."""


class _Server(uvicorn.Server):
    """Ends the answers that are on their way when the time for them is over.

    Connections come in small portions, so that there are never many more than may be.
    """

    def __init__(self, config: uvicorn.Config, client: AsyncClient, drain_s: float) -> None:
        super().__init__(config)
        self._client = client
        self._drain_s = drain_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen. Only few connections are accepted in a turn, yet many may wait for theirs."""
        await super().startup(sockets)
        # asyncio takes one number for both; the kernel's may be set again.
        for server in self.servers:
            for listener in server.sockets:
                with listener.dup() as same:
                    same.listen(_BACKLOG)

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
        FileNotFoundError, ValueError: the model's directory has no tokenizer, or no config.json,
            or a generation_config.json that cannot be used; or OTEL_* variables are wrong.
        OSError, ValueError: a file of keys cannot be read, or is not valid; or too few files may be
            open for `server.max_connections`.
        SystemExit: the address is taken; uvicorn has logged why.
    """
    server: _Server | None = None

    def stop(*_: object) -> None:
        if server is None:
            raise SystemExit(0)  # there is nothing to drain yet
        server.should_exit = True

    # uvicorn takes these signals, drains, and raises them once more for the handlers before it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    tokenizer = Tokenizer(config.model.directory)
    client = AsyncClient(client_address(config.coordinator), tokenizer)
    key_file = config.server.api_key_file
    app = create_app(
        client,
        tokenizer,
        tool_parser=config.server.tool_parser,
        reasoning_parser=config.server.reasoning_parser,
        sampling_defaults=_sampling_defaults(config),
        live_view=config.server.live_view,
        api_keys=ApiKeys(Path(key_file).expanduser()) if key_file else None,
        cors_origins=config.server.cors_origins,
        stopping=lambda: server is not None and server.should_exit,
        max_body_bytes=config.server.max_body_bytes or body_limit(_max_context(config)),
        tracing=_tracing(),
    )
    for name in ("uvicorn.error", "asyncio"):
        logging.getLogger(name).addFilter(FewWarnings())
    drain_s = config.coordinator.drain_timeout_s
    server = _Server(
        uvicorn.Config(
            app,
            http=bounded_connections(allow_connections(config.server.max_connections)),
            backlog=ACCEPTED_AT_ONCE,
            host=config.server.host,
            port=config.server.port,
            access_log=logging.getLogger().isEnabledFor(logging.INFO),
            log_config=None,  # as the command line has set it up
            ws="none",
            timeout_graceful_shutdown=math.ceil(drain_s + _LAST_WORDS_S + _WRITE_S),
        ),
        client,
        drain_s,
    )
    server.run(None if listener is None else [listener])
    return 0


def _tracing() -> Tracing | None:
    """Spans, where the environment says whereto; without the packages one line says so."""
    exporter = os.environ.get("OTEL_TRACES_EXPORTER")
    if exporter == "none" or not (exporter or any(map(os.environ.get, _COLLECTORS))):
        return None
    try:
        from fastserve_mega.server.tracing import open_tracing

        return open_tracing()
    except ModuleNotFoundError as error:
        _log.warning(
            "no traces, though the environment (OTEL_*) asks for them: %s is missing: "
            "pip install 'fastserve_mega[otel]'",
            error.name,
        )
        return None


def _sampling_defaults(config: Config) -> SamplingDefaults:
    if config.server.generation_defaults == "none":
        return NO_DEFAULTS
    return load_sampling_defaults(config.model.directory)


def _max_context(config: Config) -> int:
    return config.model.max_context or load_architecture(config.model.directory).max_context
