"""Checks of this machine: names, cores, disk, memory."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fastserve_mega.doctor.finding import Finding, ProbeError, ok, problem, python_probe, warning
from fastserve_mega.system.config import Config

GIB = 2**30
_SPACE_BYTES = 256 * 2**20
"""Files of mpirun and shared memory of a few ranks."""
_RESOLVE_TIMEOUT_S = 20.0
_RESOLVE = """
import json, socket
print(json.dumps(socket.gethostbyname(socket.gethostname())))
"""


def check_host_name(config: Config | None) -> Iterator[Finding]:
    """Check that other hosts could find this one by the address ranks tell each other."""
    name = socket.gethostname()
    hosts = 1
    if config is not None:
        hosts = -(-config.parallel.world_size // config.hardware.devices_per_node)
    complain = problem if hosts > 1 else warning
    remedy = "give it its address in /etc/hosts or DNS, or set MASTER_ADDR"
    try:
        address = python_probe(_RESOLVE, _RESOLVE_TIMEOUT_S)
    except ProbeError as error:
        yield complain("host name", f"{name} is not found: {error}", remedy)
        return
    if address.startswith("127.") and hosts > 1:
        said = f"{name} is {address}, which the other {hosts - 1} hosts cannot reach"
        yield problem("host name", said, remedy)
    else:
        yield ok("host name", f"{name} is {address}")


def check_cores(config: Config | None) -> Iterator[Finding]:
    """Enough cores for the threads of the ranks and the coordinator."""
    cores = len(os.sched_getaffinity(0))
    if config is None or config.parallel.threads_per_rank is None:
        yield ok("cores", str(cores))
        return
    ranks = min(config.parallel.world_size, config.hardware.devices_per_node)
    threads = ranks * config.parallel.threads_per_rank
    if threads > cores:
        said = f"{cores}; {ranks} ranks of {config.parallel.threads_per_rank} threads want more"
        yield warning("cores", said, "lower parallel.threads_per_rank, or leave it null")
    else:
        yield ok("cores", f"{cores}, for {threads} threads of ranks")


def check_space() -> Iterator[Finding]:
    """Space that mpirun, torch and NCCL need to run at all."""
    for directory in dict.fromkeys((Path(tempfile.gettempdir()), Path("/dev/shm"))):
        if not directory.is_dir():
            yield warning("space", f"there is no {directory}", "mount it: ranks share memory in it")
            continue
        free = shutil.disk_usage(directory).free
        found = f"{free / GIB:.1f} GiB free in {directory}"
        if not os.access(directory, os.W_OK):
            yield problem("space", f"{directory} cannot be written", "change its permissions")
        elif free < _SPACE_BYTES:
            remedy = "free some; in a container, --shm-size=1g" if "shm" in str(directory) else ""
            yield problem("space", found, remedy or "free some, or set TMPDIR")
        else:
            yield ok("space", found)
