"""All processes of a deployment on one machine: ranks, coordinator, HTTP server."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from typing import Literal

from fastserve_mega.launcher.probes import CoordinatorProbe, Watch, http_status
from fastserve_mega.launcher.processes import (
    KILL_AFTER_S,
    LaunchError,
    end_tree,
    kept_configuration,
    mpirun_files,
    own_command,
    ranks_prefix,
    spawn,
)
from fastserve_mega.messaging.messages import Snapshot
from fastserve_mega.process_tree import await_any_end, end_descendants, stopped
from fastserve_mega.system.config import Config
from fastserve_mega.system.key_file import client_address

PROBE_S = 1.0
"""Time between two looks at the processes, and longest wait for the answer to one of them."""
_HTTP_START_S = 60.0
_BACKLOG = 2048
"""Connections that wait while there is no HTTP server."""
_LAST_WORDS_S = 2.0
"""How long the coordinator may take to tell its clients that its ranks are lost."""
RANKS, HTTP_SERVER = "ranks", "api-server"

_log = logging.getLogger(__name__)


class Deployment:
    """The processes of one configuration. A context manager: leaving it ends them all."""

    def __init__(
        self,
        config: Config,
        arguments: Sequence[str],
        *,
        http: bool,
        restarts: bool = False,
        runner: Literal["megatron", "fake"] = "megatron",
    ) -> None:
        """Prepare; nothing is started yet.

        Args:
            config: of the deployment.
            arguments: --config and --set arguments that give a child the same configuration.
            http: start the OpenAI-compatible server as well.
            restarts: the caller means to call `restart` when something ends, and has no other
                children: all processes below this one belong to the deployment.
            runner: of the ranks; `fake` computes nothing and is for tests.
        """
        self._restarts = restarts
        self._config = config
        self._client_address = config.coordinator.client_endpoint
        self._given_arguments = arguments
        self._arguments: list[str] = []
        self._http = http
        self._runner = runner
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._watches: dict[str, Watch] = {}
        self._own_files = contextlib.ExitStack()
        self._files = contextlib.ExitStack()
        self._listener: socket.socket | None = None
        self._probe: CoordinatorProbe | None = None

    def __enter__(self) -> Deployment:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start everything and return when requests can be sent.

        Raises:
            LaunchError: a process ended, the time limits of the configuration ran out, the HTTP
                port is taken, or the file of the clients' key cannot be used.
        """
        try:
            self._client_address = client_address(self._config.coordinator)
            kept = kept_configuration(self._given_arguments)
            self._arguments = self._own_files.enter_context(kept)
        except (OSError, ValueError) as error:
            raise LaunchError(str(error)) from None
        if self._http:
            self._listener = _listen(self._config.server.host, self._config.server.port)
        self._start_ranks()
        if self._http:
            self._start_http_server()

    def lost(self) -> dict[str, str]:
        """What does not run or does not answer though it should, and a sentence on each."""
        wanted = [RANKS, HTTP_SERVER] if self._http else [RANKS]
        return {name: reason for name in wanted if (reason := self._trouble(name))}

    def snapshot(self) -> Snapshot | None:
        """What the coordinator is doing; None when it does not answer."""
        return self._probe.snapshot(PROBE_S) if self._probe else None

    def restart(self, names: Collection[str]) -> None:
        """Kill what is left of some processes, and start them again at the same addresses.

        Raises:
            LaunchError: they did not start; it may be tried again.
        """
        for name in names:
            self._end(name)
        if RANKS in names:
            self._start_ranks()
        if HTTP_SERVER in names:
            self._start_http_server()

    def await_end(self, limit_s: float) -> None:
        """Wait until a process ends, or for so long."""
        await_any_end([each.pid for each in self._processes.values()], limit_s)

    def check(self) -> None:
        """Raise LaunchError when a process has ended."""
        for name in self._processes:
            self._check(name)

    def stop(self) -> None:
        """End all processes within one limit; kill at once when interrupted meanwhile."""
        deadline = time.monotonic() + self._config.coordinator.drain_timeout_s + KILL_AFTER_S
        try:
            self._close_own()
            for name, process in self._processes.items():
                if process.poll() is None:
                    process.send_signal(_stop_signal(name, restarts=self._restarts))
            for process in self._processes.values():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))
        except KeyboardInterrupt:
            _log.warning("killing everything")
        finally:
            for process in self._processes.values():
                end_tree(process)
            self._processes.clear()
            if self._restarts:
                end_descendants()
            self._files.close()
            self._own_files.close()

    def _close_own(self) -> None:
        if self._probe:
            self._probe.close()
        if self._listener:
            self._listener.close()  # connections are refused from now on

    def _trouble(self, name: str) -> str:
        if name not in self._processes:
            return f"there is no {name} process"
        try:
            self._check(name)
        except LaunchError as error:
            return str(error)
        watch = self._watches.get(name)
        if watch is not None and watch.hangs(time.monotonic()):
            limit = f"for {self._config.supervisor.hang_limit_s:g} s (supervisor.hang_limit_s)"
            if halted := stopped(self._processes[name].pid):
                return f"processes {sorted(halted)} of the {name} have been stopped {limit}"
            what = "coordinator" if name == RANKS else name
            return f"the {what} has not answered {limit}"
        return ""

    def _check(self, name: str) -> None:
        if (status := self._processes[name].poll()) is not None:
            raise LaunchError(f"the {name} process ended with status {status}")

    def _end(self, name: str) -> None:
        self._watches.pop(name, None)
        process = self._processes.pop(name, None)
        if process is None:
            return
        has_ended = process.poll() is not None
        end_tree(process)
        if self._restarts:
            # The coordinator is in no group with mpirun, and may have ranks of its own to blame.
            others = [other.pid for other in self._processes.values()]
            end_descendants(keep=others, grace_s=_LAST_WORDS_S if has_ended else 0.0)

    def _start_ranks(self) -> None:
        epoch = uuid.uuid4().hex
        command = [*ranks_prefix(self._config), *own_command("worker", self._arguments)]
        command += ["--runner", self._runner, "--epoch", epoch]
        if self._restarts:
            command += ["--supervisor", str(os.getpid())]
        if self._probe:
            self._probe.close()
        try:
            probe = self._probe = CoordinatorProbe(self._client_address, epoch)
        except ValueError as error:
            raise LaunchError(f"coordinator.client_endpoint is {error}") from None
        self._files.close()
        variables = self._files.enter_context(mpirun_files())
        self._start(
            RANKS,
            lambda: spawn(command, variables=variables),
            lambda: probe.answers(PROBE_S),
            self._config.coordinator.startup_timeout_s,
        )

    def _start_http_server(self) -> None:
        assert self._listener is not None
        descriptor = self._listener.fileno()
        command = own_command("api-server", [*self._arguments, "--listen-fd", str(descriptor)])
        host, port = self._listener.getsockname()[:2]
        self._start(
            HTTP_SERVER,
            lambda: spawn(command, pass_fds=[descriptor]),
            # Whatever it answers: it may know of no coordinator, and is not to blame for that.
            lambda: http_status(host, port, "/version", PROBE_S) is not None,
            _HTTP_START_S,
        )

    def _start(
        self,
        name: str,
        launch: Callable[[], subprocess.Popen[bytes]],
        answers: Callable[[], bool],
        limit_s: float,
    ) -> None:
        """Start a process and wait until it answers; it is ended when it does not."""
        self._processes[name] = launch()
        try:
            self._await(name, answers, limit_s)
        except LaunchError:
            self._end(name)
            raise
        process_id = self._processes[name].pid
        self._watches[name] = Watch(
            # A stopped rank or mpirun is missed only when it has something to do; and none answers,
            # so there is no use in waiting for that.
            lambda: not stopped(process_id) and answers(),
            self._config.supervisor.hang_limit_s,
            time.monotonic(),
        )

    def _await(self, name: str, answers: Callable[[], bool], limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while True:
            self._check(name)
            begin = time.monotonic()
            if answers():
                return
            if time.monotonic() > deadline:
                raise LaunchError(f"no answer from {name} after {limit_s:g} s")
            time.sleep(max(0.0, begin + PROBE_S - time.monotonic()))


def _listen(host: str, port: int) -> socket.socket:
    """Take the port before the model is loaded, and keep it whatever the HTTP server does.

    Raises:
        LaunchError: it cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise LaunchError(
            f"cannot listen on {host}:{port} (server.host, server.port): {reason}"
        ) from None


def _stop_signal(name: str, *, restarts: bool) -> signal.Signals:
    """Mpirun sends SIGTERM also when a rank has died, so supervised ranks take it for that."""
    return signal.SIGUSR1 if restarts and name == RANKS else signal.SIGTERM


def http_url(config: Config) -> str:
    """Base URL of the HTTP server."""
    host = f"[{config.server.host}]" if ":" in config.server.host else config.server.host
    return f"http://{host}:{config.server.port}"
