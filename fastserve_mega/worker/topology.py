"""Where this rank stands among all ranks, read from the launcher's environment."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass

_RANK = ("RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")
_SIZE = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS")
_LOCAL_RANK = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
_LOCAL_SIZE = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


@dataclass(frozen=True, slots=True)
class Topology:
    """This rank, and how many there are, on all hosts and on this one."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1

    def within_replica(self, replica_size: int) -> Topology:
        """This rank among the ranks of its replica, which are numbered one after another."""
        return dataclasses.replace(self, rank=self.rank % replica_size, world_size=replica_size)


def read_topology(environment: Mapping[str, str] | None = None) -> Topology:
    """Read mpirun's, torchrun's, srun's or MPICH's variables; a lone process is rank 0 of 1.

    Raises:
        ValueError: a variable is not a number, or rank and size contradict each other.
    """
    environment = os.environ if environment is None else environment
    rank = _first(environment, _RANK, 0)
    size = _first(environment, _SIZE, 1)
    if not 0 <= rank < size:
        raise ValueError(f"the launcher gave rank {rank} of {size} ranks")
    return Topology(
        rank=rank,
        world_size=size,
        local_rank=_first(environment, _LOCAL_RANK, rank),
        local_size=_first(environment, _LOCAL_SIZE, size),
    )


def _first(environment: Mapping[str, str], names: tuple[str, ...], default: int) -> int:
    for name in names:
        if (text := environment.get(name)) is not None:
            try:
                return int(text)
            except ValueError:
                raise ValueError(f"{name} must be a number, got {text!r}") from None
    return default
