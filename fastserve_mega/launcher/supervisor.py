"""What `fastserve-mega serve` does: keep a deployment up until it is told to stop."""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from fastserve_mega.launcher.deployment import PROBE_S, Deployment, http_url
from fastserve_mega.launcher.processes import LaunchError
from fastserve_mega.system.config import Config

_MAX_RESTARTS = 3
_RESTART_WINDOW_S = 600.0

_log = logging.getLogger(__name__)


def serve(config: Config, arguments: Sequence[str]) -> int:
    """`fastserve-mega serve`: run until Ctrl-C or SIGTERM; returns the exit status."""
    stopping = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal stopping
        if stopping:
            return
        stopping = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    with Deployment(config, arguments, http=True, restarts=True) as deployment:
        try:
            if config.server.port:
                _check_free(config.server.host, config.server.port)
            deployment.start()
            print(_how_to_use(config, arguments), flush=True)
            _supervise(deployment)
        except KeyboardInterrupt:
            _log.warning("stopping")
            return 0
        except LaunchError as error:
            _log.error("%s", error)
            return 1


def _supervise(deployment: Deployment) -> NoReturn:
    """Start the ranks again whenever they end, unless they do so all the time."""
    restarts: deque[float] = deque(maxlen=_MAX_RESTARTS)
    while True:
        time.sleep(PROBE_S)
        try:
            deployment.check()
            continue
        except LaunchError as error:
            now = time.monotonic()
            if len(restarts) == _MAX_RESTARTS and now - restarts[0] < _RESTART_WINDOW_S:
                raise LaunchError(
                    f"{error}, after {_MAX_RESTARTS} restarts within {_RESTART_WINDOW_S:g} s"
                ) from None
            restarts.append(now)
            _log.warning("%s; starting again", error)
        deployment.restart_ranks()
        _log.warning("serving again")


def _check_free(host: str, port: int) -> None:
    """Refuse a taken port now, and not when the model is loaded.

    Raises:
        LaunchError: it cannot be listened on.
    """
    try:
        # As the HTTP server does: a port whose last connections are still closing is free.
        socket.create_server((host, port), reuse_port=False).close()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise LaunchError(
            f"cannot listen on {host}:{port} (server.host, server.port): {reason}"
        ) from None


def _how_to_use(config: Config, arguments: Sequence[str]) -> str:
    url, name = http_url(config), config.model.name
    return f"""
{name} is being served. Try:

  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'

  python -c "from openai import OpenAI; print(OpenAI(base_url='{url}/v1', api_key='none')
    .chat.completions.create(model='{name}', messages=[{{'role': 'user', 'content': 'Hello!'}}])
    .choices[0].message.content)"

  fastserve-mega chat {" ".join(arguments)}

Ctrl-C ends it.
"""
