"""Where this rank stands among all ranks, read from the launcher's environment."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Launcher:
    """What starts the ranks, and the variables in which it tells each of them its place."""

    name: str
    """For messages."""
    rank: str
    world_size: str
    local_rank: str
    local_size: str
    has_mpi: bool
    """Whether its ranks can find each other over MPI."""
    sign: str = ""
    """A variable that must be there as well; empty: none."""

    @property
    def is_process(self) -> bool:
        """Whether it stays as long as its ranks; not a person who sets variables in a shell."""
        return bool(self.sign) or self.rank != "RANK"

    def can_use(self, mpi_library: str) -> bool:
        """Whether ranks with this MPI library, by its name, find each other."""
        is_open_mpi = mpi_library.startswith("Open MPI")
        if self.rank.startswith("OMPI_"):
            return is_open_mpi
        # MPICH, and what descends from it.
        return not is_open_mpi or not self.rank.startswith("PMI_")


# The innermost launcher counts: mpirun may run inside a Slurm job, and torchrun under mpirun. So
# the order is that of nesting, and a launcher's variables are taken together or not at all.
_LAUNCHERS = (
    Launcher(
        "torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE",
        has_mpi=False, sign="TORCHELASTIC_RUN_ID",
    ),
    Launcher(
        "mpirun of Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", has_mpi=True,
    ),
    Launcher(
        "srun with PMIx", "PMIX_RANK", "SLURM_NTASKS", "SLURM_LOCALID", "", has_mpi=True,
        sign="SLURM_STEP_ID",
    ),
    Launcher(
        "mpiexec of MPICH", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS",
        has_mpi=True,
    ),
    # A batch script has the other variables as well; only srun's tasks belong to a step.
    Launcher(
        "srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "", has_mpi=False,
        sign="SLURM_STEP_ID",
    ),
    Launcher("RANK", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", has_mpi=False),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Topology:
    """This rank, and how many there are, on all hosts and on this one."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: Launcher | None = None
    """None for a lone process that nothing but a shell has started."""
    hosts: tuple[str, ...] = ()
    """Host names by rank, once the ranks have told each other."""

    @property
    def has_several_hosts(self) -> bool:
        return len(set(self.hosts)) > 1

    def within_replica(self, replica_size: int) -> Topology:
        """This rank among the ranks of its replica, which are numbered one after another."""
        rank = self.rank % replica_size
        hosts = self.hosts[self.rank - rank :][:replica_size]
        return replace(self, rank=rank, world_size=replica_size, hosts=hosts)


def read_topology(environment: Mapping[str, str] | None = None) -> Topology:
    """Read the variables of mpirun, torchrun or srun; a lone process is rank 0 of 1.

    Raises:
        ValueError: a variable is not a number, or rank and size contradict each other.
    """
    environment = os.environ if environment is None else environment
    launcher = find_launcher(environment)
    if launcher is None:
        return Topology()
    rank = _number(environment, launcher.rank, 0)
    size = _number(environment, launcher.world_size, 1)
    if not 0 <= rank < size:
        raise ValueError(
            f"{launcher.name} gave rank {rank} of {size} ranks ({launcher.rank}, "
            f"{launcher.world_size})"
        )
    return Topology(
        rank=rank,
        world_size=size,
        local_rank=_number(environment, launcher.local_rank, rank),
        local_size=_number(environment, launcher.local_size, size),
        launcher=launcher,
    )


def find_launcher(environment: Mapping[str, str]) -> Launcher | None:
    """The innermost launcher all of whose variables are there."""
    for launcher in _LAUNCHERS:
        wanted = [launcher.rank, launcher.world_size, launcher.sign]
        if all(name in environment for name in wanted if name):
            return launcher
    return None


def place_on_hosts(topology: Topology, hosts: Sequence[str]) -> Topology:
    """Count the ranks of this host, which not every launcher tells.

    Args:
        topology: as the launcher tells it.
        hosts: names of the ranks' hosts, in rank order.
    """
    own = hosts[topology.rank]
    here = [rank for rank, host in enumerate(hosts) if host == own]
    return replace(
        topology,
        local_rank=here.index(topology.rank),
        local_size=len(here),
        hosts=tuple(hosts),
    )


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    if (text := environment.get(name)) is None:
        return default
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} must be a number, got {text!r}") from None
