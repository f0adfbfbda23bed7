"""A deployment for as long as a job takes, at addresses that nobody else has."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import zmq
from msgspec import structs

from fastserve_mega.launcher.deployment import Deployment
from fastserve_mega.launcher.processes import LaunchError, free_port
from fastserve_mega.launcher.supervisor import supervise
from fastserve_mega.process_tree import adopt_orphans
from fastserve_mega.system.config import Config

_log = logging.getLogger(__name__)
_LOCAL = "127.0.0.1"
_SOCKET = "clients"


class _OverError(Exception):
    """The job is done: no more need to look after the deployment."""


@contextlib.contextmanager
def temporary_deployment(
    config: Config,
    arguments: Sequence[str],
    *,
    http: bool,
    restarts: bool = False,
    runner: Literal["megatron", "fake"] = "megatron",
) -> Iterator[Config]:
    """Run a deployment; what is yielded has its addresses.

    Args:
        config: of the deployment.
        arguments: --config and --set arguments that give a child the same configuration.
        http: with an HTTP server.
        restarts: what ends or hangs is started again, in a thread; this process then must have no
            other children.
        runner: of the ranks.

    Raises:
        LaunchError: it does not start.
    """
    with _own_directory() as directory:
        endpoint, port = f"ipc://{Path(directory) / _SOCKET}", free_port()
        changes = {
            "coordinator.client_endpoint": endpoint,
            "server.host": _LOCAL,
            "server.port": port,
        }
        overrides = [w for name in changes for w in ("--set", f"{name}={changes[name]}")]
        own = structs.replace(
            config,
            coordinator=structs.replace(config.coordinator, client_endpoint=endpoint),
            server=structs.replace(config.server, host=_LOCAL, port=port),
        )
        deployment = Deployment(
            own, [*arguments, *overrides], http=http, restarts=restarts, runner=runner
        )
        with deployment:
            deployment.start()
            with _looked_after(deployment, own) if restarts else contextlib.nullcontext():
                yield own


def _own_directory() -> tempfile.TemporaryDirectory[str]:
    """For the socket of the clients, whose path has a limit that some directories exceed."""
    usual, prefix = tempfile.gettempdir(), "fastserve-mega-"
    length = len(os.fsencode(Path(usual) / f"{prefix}xxxxxxxx" / _SOCKET))
    where = usual if length <= zmq.IPC_PATH_MAX_LEN else "/tmp"
    return tempfile.TemporaryDirectory(prefix=prefix, dir=where)


@contextlib.contextmanager
def _looked_after(deployment: Deployment, config: Config) -> Iterator[None]:
    adopt_orphans()
    over = threading.Event()

    def sleep(seconds: float) -> None:
        if over.wait(seconds):
            raise _OverError

    def look_after() -> None:
        try:
            supervise(deployment, config.supervisor, sleep)
        except _OverError:
            pass
        except LaunchError as error:
            _log.error("%s", error)  # the job finds nobody who answers

    thread = threading.Thread(target=look_after, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
