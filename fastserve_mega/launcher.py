"""All processes of a deployment on one machine: ranks, coordinator, HTTP server."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

from fastserve_mega.client import Client, ServerUnavailableError
from fastserve_mega.system.config import Config

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
_PROBE_S = 1.0
_KILL_AFTER_S = 10.0
_HTTP_START_S = 60.0
_RANKS = "ranks"
_MAX_RESTARTS = 3
_RESTART_WINDOW_S = 600.0

_log = logging.getLogger(__name__)


class LaunchError(Exception):
    """A process did not start, or ended by itself; str() says which."""


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
            self._spawn("api-server", self._command("api-server"))
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
            _end_group(process)
            self._processes.remove((name, process))
        self._start_ranks()

    def check(self) -> None:
        """Raise LaunchError when a process has ended."""
        for name, process in self._processes:
            if (status := process.poll()) is not None:
                raise LaunchError(f"the {name} process ended with status {status}")

    def stop(self) -> None:
        """End all processes, those started last first; kill what does not end by itself."""
        limit_s = self._config.coordinator.drain_timeout_s + _KILL_AFTER_S
        for name, process in reversed(self._processes):
            if process.poll() is None:
                process.send_signal(_stop_signal(name, restarts=self._restarts))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(limit_s)
            _end_group(process)
        self._processes.clear()

    def _start_ranks(self) -> None:
        command = [*_ranks_prefix(self._config), *self._command("worker")]
        self._spawn(_RANKS, [*command, "--supervised"] if self._restarts else command)
        self._await(self._coordinator_answers, self._config.coordinator.startup_timeout_s)

    def _command(self, name: str) -> list[str]:
        return [sys.executable, "-m", "fastserve_mega", name, *self._arguments]

    def _spawn(self, name: str, command: list[str]) -> None:
        environment = dict(os.environ)
        if sys.stderr.isatty():
            # mpirun puts a pipe in between; without this there would be no bar that moves.
            environment["FORCE_COLOR"] = "1"
        # Its own session: a terminal's Ctrl-C reaches this process only, which ends the others
        # in order.
        process = subprocess.Popen(
            command,
            env=environment,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            preexec_fn=_end_with_parent,  # noqa: PLW1509 - one system call, no lock
        )
        self._processes.append((name, process))

    def _await(self, answers: Callable[[], bool], limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while True:
            self.check()
            begin = time.monotonic()
            if answers():
                return
            if time.monotonic() > deadline:
                raise LaunchError(f"no answer from {self._processes[-1][0]} after {limit_s:g} s")
            time.sleep(max(0.0, begin + _PROBE_S - time.monotonic()))

    def _coordinator_answers(self) -> bool:
        endpoint = self._config.coordinator.client_endpoint
        client = Client(endpoint, timeout_s=_PROBE_S)
        try:
            client.info()
        except ServerUnavailableError:
            return False
        finally:
            client.close()
        return True

    def _http_answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{http_url(self._config)}/health", timeout=_PROBE_S):
                return True
        except OSError:
            return False


def _stop_signal(name: str, *, restarts: bool) -> signal.Signals:
    """Mpirun sends SIGTERM also when a rank has died, so supervised ranks take it for that."""
    return signal.SIGUSR1 if restarts and name == _RANKS else signal.SIGTERM


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a process group that has lost its leader and its purpose."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _end_with_parent() -> None:
    """In the child: have the kernel send SIGTERM when this process is killed outright."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def http_url(config: Config) -> str:
    """Base URL of the HTTP server."""
    return f"http://{config.server.host}:{config.server.port}"


def _ranks_prefix(config: Config) -> list[str]:
    """What starts the ranks: nothing for a single one, mpirun for more."""
    ranks = config.parallel.world_size
    return [] if ranks == 1 else mpirun_command(ranks)


def mpirun_command(ranks: int) -> list[str]:
    """The start of a command line that runs the rest of it on so many ranks.

    Raises:
        LaunchError: there is no mpirun beside this Python or on the PATH.
    """
    beside_python = Path(sys.executable).parent / "mpirun"
    mpirun = str(beside_python) if beside_python.exists() else shutil.which("mpirun")
    if mpirun is None:
        raise LaunchError(
            f"{ranks} ranks need mpirun: pip install 'fastserve_mega[mpi]', or a system MPI"
        )
    version = subprocess.run([mpirun, "--version"], capture_output=True, text=True, check=False)
    options: list[str] = []
    if "Open MPI" in version.stdout:
        options = ["--oversubscribe", "--bind-to", "none"]
        if os.geteuid() == 0:
            options.append("--allow-run-as-root")
    return [mpirun, *options, "-n", str(ranks)]


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
        time.sleep(_PROBE_S)
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


def profile(config: Config, arguments: Sequence[str], output: Path) -> int:
    """`fastserve-mega profile`: start the ranks, let them be measured; returns the exit status."""
    output = output.resolve()
    if not output.parent.is_dir():
        print(f"fastserve-mega profile: no directory {output.parent}", file=sys.stderr)
        return 2
    try:
        prefix = _ranks_prefix(config)
    except LaunchError as error:
        print(f"fastserve-mega profile: {error}", file=sys.stderr)
        return 1
    command = [sys.executable, "-m", "fastserve_mega", "worker", *arguments]
    environment = dict(os.environ)
    if sys.stderr.isatty():
        # mpirun puts a pipe in between; without this there would be no bar that moves.
        environment["FORCE_COLOR"] = "1"
    ranks = subprocess.Popen(
        [*prefix, *command, "--profile-to", str(output)],
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        status = ranks.wait()
    except KeyboardInterrupt:
        ranks.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            ranks.wait(_KILL_AFTER_S)
        return 1
    finally:
        _end_group(ranks)
    if status == 0:
        print(f"{output} is written; use it with --set scheduler.profile={output}")
    return status


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
