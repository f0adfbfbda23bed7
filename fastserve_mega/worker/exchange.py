"""Talk among the ranks before anything is loaded: addresses, and giving up together."""

from __future__ import annotations

import os
import socket
from array import array
from itertools import accumulate
from typing import Protocol

from fastserve_mega.worker.topology import Topology


class Exchange(Protocol):
    """Collective calls: every rank makes them in the same order."""

    def broadcast(self, value: str) -> str:
        """Rank 0's value, on every rank."""

    def gather(self, value: str) -> list[str]:
        """The values of all ranks in rank order, on every rank."""

    def abort(self) -> None:
        """End all ranks now, with a non-zero status."""


class SingleExchange:
    """For a lone rank, which then needs no MPI."""

    def broadcast(self, value: str) -> str:
        return value

    def gather(self, value: str) -> list[str]:
        return [value]

    def abort(self) -> None:
        os._exit(1)


class MpiExchange:
    """MPI_COMM_WORLD. Bytes travel, not objects: those mpi4py would pickle."""

    def __init__(self) -> None:
        """Initialize MPI.

        Raises:
            ImportError: there is no MPI library.
        """
        from mpi4py import MPI

        self._world = MPI.COMM_WORLD
        self._byte = MPI.BYTE

    def broadcast(self, value: str) -> str:
        return self.gather(value)[0]

    def gather(self, value: str) -> list[str]:
        data = value.encode()
        lengths = array("q", [0]) * self._world.Get_size()
        self._world.Allgather(array("q", [len(data)]), lengths)
        everything = bytearray(sum(lengths))
        self._world.Allgatherv(
            [data, self._byte], [everything, (lengths.tolist(), None), self._byte]
        )
        ends = list(accumulate(lengths))
        return [
            everything[end - length : end].decode()
            for end, length in zip(ends, lengths, strict=True)
        ]

    def abort(self) -> None:
        self._world.Abort(1)


def make_exchange(topology: Topology) -> Exchange:
    """MPI when there is anybody to talk to."""
    return MpiExchange() if topology.world_size > 1 else SingleExchange()


def choose_master(topology: Topology) -> str:
    """A host:port on this host for torch.distributed to meet at."""
    address = os.environ.get("MASTER_ADDR")
    if address is None:
        alone = topology.local_size == topology.world_size
        address = "127.0.0.1" if alone else socket.gethostbyname(socket.gethostname())
    with socket.socket() as probe:
        probe.bind((address, 0))
        port = os.environ.get("MASTER_PORT") or probe.getsockname()[1]
    return f"{address}:{port}"
