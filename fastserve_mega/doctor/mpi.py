"""Checks of MPI: the library in Python, mpirun, and both together."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from fastserve_mega.doctor.finding import Finding, ok, problem, warning
from fastserve_mega.doctor.probe import ProbeError, python_probe, run_probe
from fastserve_mega.launcher import LaunchError, mpirun_command
from fastserve_mega.system.config import Config

_TIMEOUT_S = 60.0
_LIBRARY = """
import json
from mpi4py import MPI
lines = open("/proc/self/maps").read().splitlines()
files = sorted({line.split()[-1] for line in lines if "/libmpi" in line})
print(json.dumps({"vendor": MPI.get_vendor()[0], "version": MPI.get_vendor()[1], "files": files}))
"""
_TOGETHER = "from mpi4py import MPI; print('ranks:', MPI.COMM_WORLD.Get_size(), flush=True)"
_INSTALL = "pip install 'fastserve_mega[mpi]', or a system MPI with mpi4py built for it"


def check_mpi(config: Config | None) -> Iterator[Finding]:
    """The MPI library that mpi4py loads, mpirun, and that they are of one kind.

    One rank needs none of it, and torchrun needs no mpirun: then nothing here is a problem.
    """
    needed = config is None or config.parallel.world_size > 1
    complain = problem if needed else warning
    try:
        library = python_probe(_LIBRARY, _TIMEOUT_S)
    except ProbeError as error:
        yield complain("MPI library", f"mpi4py cannot load one: {error}", _INSTALL)
        return
    version = ".".join(map(str, library["version"]))
    found = f"{library['vendor']} {version}"
    yield ok("MPI library", f"{found}, {', '.join(library['files'])}")
    try:
        command = mpirun_command(2)
    except LaunchError:
        remedy = f"{_INSTALL}; or start the ranks with torchrun or srun"
        yield complain("mpirun", "not found", remedy)
        return
    try:
        said = run_probe([*command, sys.executable, "-c", _TOGETHER], _TIMEOUT_S)
    except ProbeError as error:
        yield complain("mpirun", f"{command[0]} cannot start two ranks: {error}", _INSTALL)
        return
    if said.count("ranks: 2") == 2:
        yield ok("mpirun", f"{command[0]} starts ranks that find each other")
    else:
        said = f"{command[0]} is not of {found}: two ranks were each alone"
        remedy = "use the mpirun of the library above, or build mpi4py for this mpirun"
        yield complain("mpirun", said, remedy)
