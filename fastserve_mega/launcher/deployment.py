"""All processes of a deployment on one machine: ranks, coordinator, HTTP server."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Sequence
from types import TracebackType

from fastserve_mega.client import Client, ServerUnavailableError
from fastserve_mega.launcher.processes import (
    KILL_AFTER_S,
    LaunchError,
    end_group,
    own_command,
    ranks_prefix,
    spawn,
)
from fastserve_mega.system.config import Config

PROBE_S = 1.0
"""Time between two looks at the processes."""
_HTTP_START_S = 60.0
_RANKS = "ranks"


class Deployment:
    """The processes of one configuration. A context manager: leaving it ends them all."""

    def __init__(
        self, config: Config, arguments: Sequence[str], *, http: bool, restarts: bool = False
    ) -> None:
        """Prepare; nothing is started yet.

        Args:
            config: of the deployment.
            arguments: --config and --set arguments that give a child the same configuration.
            http: start the OpenAI-compatible server as well.
            restarts: the caller means to call `restart_ranks` when they end.
        """
        self._restarts = restarts
        self._config = config
        self._arguments = list(arguments)
        self._http = http
        self._processes: list[tuple[str, subprocess.Popen[bytes]]] = []

    def __enter__(self) -> Deployment:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start everything and return when requests can be sent.

        Raises:
            LaunchError: a process ended, or the time limits of the configuration ran out.
        """
        self._start_ranks()
        if self._http:
            self._spawn("api-server", own_command("api-server", self._arguments))
            self._await(self._http_answers, _HTTP_START_S)

    def restart_ranks(self) -> None:
        """Start ranks and coordinator again when they have ended, on the same address.

        Raises:
            LaunchError: another process has ended, or they do not start.
        """
        ended = [entry for entry in self._processes if entry[1].poll() is not None]
        for name, process in ended:
            if name != _RANKS:
                self.check()
            end_group(process)
            self._processes.remove((name, process))
        self._start_ranks()

    def check(self) -> None:
        """Raise LaunchError when a process has ended."""
        for name, process in self._processes:
            if (status := process.poll()) is not None:
                raise LaunchError(f"the {name} process ended with status {status}")

    def stop(self) -> None:
        """End all processes, those started last first; kill what does not end by itself."""
        limit_s = self._config.coordinator.drain_timeout_s + KILL_AFTER_S
        for name, process in reversed(self._processes):
            if process.poll() is None:
                process.send_signal(_stop_signal(name, restarts=self._restarts))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(limit_s)
            end_group(process)
        self._processes.clear()

    def _start_ranks(self) -> None:
        command = [*ranks_prefix(self._config), *own_command("worker", self._arguments)]
        self._spawn(_RANKS, [*command, "--supervised"] if self._restarts else command)
        self._await(self._coordinator_answers, self._config.coordinator.startup_timeout_s)

    def _spawn(self, name: str, command: list[str]) -> None:
        self._processes.append((name, spawn(command)))

    def _await(self, answers: Callable[[], bool], limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while True:
            self.check()
            begin = time.monotonic()
            if answers():
                return
            if time.monotonic() > deadline:
                raise LaunchError(f"no answer from {self._processes[-1][0]} after {limit_s:g} s")
            time.sleep(max(0.0, begin + PROBE_S - time.monotonic()))

    def _coordinator_answers(self) -> bool:
        endpoint = self._config.coordinator.client_endpoint
        client = Client(endpoint, timeout_s=PROBE_S)
        try:
            client.info()
        except ServerUnavailableError:
            return False
        finally:
            client.close()
        return True

    def _http_answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{http_url(self._config)}/health", timeout=PROBE_S):
                return True
        except OSError:
            return False


def _stop_signal(name: str, *, restarts: bool) -> signal.Signals:
    """Mpirun sends SIGTERM also when a rank has died, so supervised ranks take it for that."""
    return signal.SIGUSR1 if restarts and name == _RANKS else signal.SIGTERM


def http_url(config: Config) -> str:
    """Base URL of the HTTP server."""
    return f"http://{config.server.host}:{config.server.port}"
