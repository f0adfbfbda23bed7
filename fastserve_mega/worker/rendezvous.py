"""How the ranks of a launcher find each other: over MPI, or at a store."""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

from fastserve_mega.worker.exchange import Exchange, ForeignMpiError, MpiExchange, SingleExchange
from fastserve_mega.worker.topology import Topology


def make_exchange(topology: Topology, limit_s: float) -> Exchange:
    """MPI where the launcher has it, else a store at MASTER_ADDR:MASTER_PORT.

    Tasks of Slurm that were not told of a store choose one.

    Args:
        topology: as the launcher tells it.
        limit_s: longest wait for the store.

    Raises:
        ValueError: the ranks cannot find each other; the message says what to set.
        ImportError: there is no MPI library.
    """
    launcher = topology.launcher
    if launcher is None or topology.world_size == 1:
        return SingleExchange()
    choose_slurm_store(os.environ)
    has_store = "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ
    alone = ""
    if launcher.has_mpi:
        try:
            mpi = MpiExchange(launcher)
            if mpi.world_size == topology.world_size:
                return mpi
            library = mpi.library
        except ForeignMpiError as error:
            library = str(error)
        alone = (
            f"the ranks were started by {launcher.name}, but mpi4py has loaded {library}, in which "
            "each of them is alone: use the launcher of that MPI, or set MPI4PY_LIBMPI to the "
            "libmpi of the launcher's"
        )
    if not has_store:
        raise ValueError(
            alone
            or f"ranks started by {launcher.name} meet at MASTER_ADDR and MASTER_PORT, which "
            "must be set to rank 0's host and a free port there"
        )
    # Imported late: it loads torch, which takes seconds.
    from fastserve_mega.worker.store_exchange import StoreExchange

    return StoreExchange(topology, limit_s)


def choose_slurm_store(environment: MutableMapping[str, str]) -> None:
    """Set MASTER_ADDR and MASTER_PORT where they are missing, for the tasks of one step of Slurm.

    The first host of the step, and a port of the step's own should two share that host.
    """
    hosts = environment.get("SLURM_STEP_NODELIST")
    job, step = environment.get("SLURM_JOB_ID", ""), environment.get("SLURM_STEP_ID", "")
    if hosts and job.isdecimal() and step.isdecimal():
        environment.setdefault("MASTER_ADDR", first_slurm_host(hosts))
        environment.setdefault("MASTER_PORT", str(20_000 + (int(job) + 101 * int(step)) % 10_000))


def first_slurm_host(hosts: str) -> str:
    """Return the first host of a list as Slurm writes it, such as `node[03-05,9],login`."""
    each_first = re.sub(r"\[([^],-]+)[^]]*\]", r"\1", hosts)
    return each_first.partition(",")[0]
