"""Starting and ending the processes of a deployment; ranks that are only to be measured."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fastserve_mega.process_tree import descendants, die_with_parent
from fastserve_mega.system.config import Config

KILL_AFTER_S = 10.0
"""How long a process may take to end by itself when it holds no requests."""


class LaunchError(Exception):
    """A process did not start, or ended by itself; str() says which."""


def spawn(
    command: Sequence[str],
    *,
    pass_fds: Sequence[int] = (),
    variables: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a child in a session of its own, which ends when this process is killed outright.

    Its own session: a terminal's Ctrl-C reaches this process only, which ends its children in
    order.
    """
    environment = {**os.environ, **(variables or {})}
    if sys.stderr.isatty():
        # mpirun puts a pipe in between; without this there would be no bar that moves.
        environment["FORCE_COLOR"] = "1"
    return subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        pass_fds=pass_fds,
        preexec_fn=die_with_parent,  # noqa: PLW1509 - one system call, no lock
    )


def end_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a child, its process group, and all that it has started."""
    below = descendants(process.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for process_id in below:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process_id, signal.SIGKILL)


def free_port() -> int:
    """A TCP port of this machine's loopback that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def own_command(name: str, arguments: Sequence[str]) -> list[str]:
    """The command line of `fastserve-mega NAME`, run by this Python."""
    return [sys.executable, "-m", "fastserve_mega", name, *arguments]


def ranks_prefix(config: Config) -> list[str]:
    """What starts the ranks: nothing for a single one, mpirun for more."""
    ranks = config.parallel.world_size
    return [] if ranks == 1 else mpirun_command(ranks)


@contextlib.contextmanager
def kept_configuration(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Replace the file of --config by a copy: who is started later is to be told the same.

    Else a file that is edited while the deployment serves would give its ranks, when they are
    started again, another configuration or model than the other processes have.
    """
    kept = list(arguments)
    with contextlib.ExitStack() as files:
        if "--config" in kept:
            place = kept.index("--config") + 1
            prefix, name = "fastserve-mega-", Path(kept[place]).name
            copy = Path(files.enter_context(tempfile.TemporaryDirectory(prefix=prefix))) / name
            copy.write_bytes(Path(kept[place]).read_bytes())
            kept[place] = str(copy)
        yield kept


@contextlib.contextmanager
def mpirun_files() -> Iterator[dict[str, str]]:
    """Make a directory for the files of one mpirun; what is yielded are the variables that say so.

    Open MPI names a directory after its process id, and does not start where a killed mpirun with
    the same id has left one: in a container that is started again, the ids are the same. What ranks
    share is a file of 16 MiB each, of which they use little; in /dev/shm, where a container may
    have no room for it, it would outlive those that are killed.
    """
    with tempfile.TemporaryDirectory(
        prefix="fastserve-mega-", ignore_cleanup_errors=True
    ) as directory:
        names = "PRTE_MCA_prte_tmpdir_base", "OMPI_MCA_btl_sm_backing_directory"
        yield {**dict.fromkeys(names, directory), **_home()}


def _home() -> dict[str, str]:
    """HOME: Open MPI does not even tell its version without, and services of systemd have none."""
    home = os.path.expanduser("~")
    return {"HOME": tempfile.gettempdir() if home == "~" else home}


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
    version = subprocess.run(
        [mpirun, "--version"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **_home()},
    )
    options: list[str] = []
    if "Open MPI" in version.stdout:
        # Ranks of one host need no TCP among them, and would listen on all addresses for it.
        options = ["--oversubscribe", "--bind-to", "none", "--mca", "btl", "^tcp"]
        if os.geteuid() == 0:
            options.append("--allow-run-as-root")
    return [mpirun, *options, "-n", str(ranks)]


def profile(config: Config, arguments: Sequence[str], output: Path) -> int:
    """`fastserve-mega profile`: start the ranks, let them be measured; returns the exit status."""
    output = output.resolve()
    if not output.parent.is_dir():
        print(f"fastserve-mega profile: no directory {output.parent}", file=sys.stderr)
        return 2
    try:
        prefix = ranks_prefix(config)
    except LaunchError as error:
        print(f"fastserve-mega profile: {error}", file=sys.stderr)
        return 1
    command = [*prefix, *own_command("worker", arguments), "--profile-to", str(output)]
    with mpirun_files() as variables:
        status = _run(command, variables)
    if status == 0:
        print(f"{output} is written; use it with --set scheduler.profile={output}")
    return status


def _run(command: Sequence[str], variables: Mapping[str, str]) -> int:
    ranks = spawn(command, variables=variables)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return ranks.wait()
    except KeyboardInterrupt:
        ranks.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            ranks.wait(KILL_AFTER_S)
        return 1
    finally:
        end_tree(ranks)
