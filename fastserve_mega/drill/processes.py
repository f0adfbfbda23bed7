"""The processes below `serve` by what they are, where they listen, and what the dead have left."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

from fastserve_mega.process_tree import descendants
from fastserve_mega.worker.topology import find_launcher

MPIRUN, COORDINATOR, HTTP_SERVER = "mpirun", "coordinator", "api-server"
_PROC = Path("/proc")
_SHARED_MEMORY = Path("/dev/shm")
_LISTENING = "0A"
"""The state of a listening socket in /proc/net/tcp."""


@dataclass(frozen=True, slots=True)
class Victim:
    """A process by its name, and what is sent to it."""

    name: str
    """`rank N`, or one of the names above."""
    signal: signal.Signals


def victims(num_ranks: int) -> list[Victim]:
    """Each process of a deployment on one machine, killed and then stopped."""
    names = [f"rank {rank}" for rank in range(num_ranks)]
    names += [COORDINATOR, *([MPIRUN] if num_ranks > 1 else []), HTTP_SERVER]
    signals = (signal.SIGKILL, signal.SIGSTOP)
    return [Victim(name, number) for number in signals for name in names]


def named_processes(server: int) -> dict[str, int]:
    """The processes below `serve` that have a name, by it."""
    found: dict[str, int] = {}
    for process_id in sorted(descendants(server)):
        if name := _name(process_id):
            found.setdefault(name, process_id)
    return found


def _name(process_id: int) -> str:
    """What a process is; empty for one that has just been forked, has ended, or is another."""
    try:
        words = (_PROC / str(process_id) / "cmdline").read_bytes().decode().split("\0")
        environment = (_PROC / str(process_id) / "environ").read_bytes().decode().split("\0")
    except OSError:
        return ""
    program = Path(words[0]).name
    if program in ("prterun", "mpirun", "mpiexec", "mpiexec.hydra"):
        return MPIRUN
    if "python" not in program or "fastserve_mega" not in words[:-1]:
        return ""
    command = words[words.index("fastserve_mega") + 1]
    if command != "worker":
        return command if command in (COORDINATOR, HTTP_SERVER) else ""
    variables = dict(line.partition("=")[::2] for line in environment if line)
    launcher = find_launcher(variables)
    return f"rank {variables[launcher.rank] if launcher else 0}"


def listening_ports(server: int) -> set[tuple[str, int]]:
    """Addresses (IPv4 as text, IPv6 as hexadecimal digits) and TCP ports of all below `serve`."""
    inodes: set[str] = set()
    for process_id in {server} | descendants(server):
        try:
            links = [os.readlink(entry) for entry in (_PROC / str(process_id) / "fd").iterdir()]
        except OSError:
            continue
        inodes.update(link[8:-1] for link in links if link.startswith("socket:["))
    found: set[tuple[str, int]] = set()
    for table in ("tcp", "tcp6"):
        if not (path := _PROC / "net" / table).exists():
            continue
        for line in path.read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTENING and fields[9] in inodes:
                address, _, port = fields[1].partition(":")
                found.add((_address(address), int(port, 16)))
    return found


def abandoned_memory() -> set[str]:
    """Names of files in /dev/shm that no running process has mapped: their owners left them."""
    if not _SHARED_MEMORY.is_dir():
        return set()
    names = {path.name for path in _SHARED_MEMORY.iterdir()}
    for process in _PROC.glob("[0-9]*"):
        try:
            mapped = (process / "maps").read_text(errors="replace").splitlines()
        except OSError:
            continue  # it has ended, or is another user's
        names.difference_update(
            line.partition(f"{_SHARED_MEMORY}/")[2]
            for line in mapped
            if f"{_SHARED_MEMORY}/" in line
        )
    return names


def _address(digits: str) -> str:
    if len(digits) > 8:
        return digits
    return ".".join(str(byte) for byte in reversed(bytes.fromhex(digits)))
