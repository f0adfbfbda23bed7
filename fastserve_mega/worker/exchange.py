"""Talk among the ranks before anything is loaded, and giving up together. No torch here."""

from __future__ import annotations

import os
import signal
import time
import warnings
from array import array
from itertools import accumulate
from typing import Any, Protocol

from fastserve_mega.worker.topology import Launcher

_LONGEST_NAP_S = 0.02
_ABORT_LIMIT_S = 5


class MissingRanksError(Exception):
    """Not all ranks have come in time; str() says which, where that is known."""


class ForeignMpiError(Exception):
    """The MPI library is not that of the launcher; str() is its name."""


class Exchange(Protocol):
    """Collective calls: every rank makes them in the same order."""

    uses_master_port: bool
    """Whether MASTER_PORT is taken by it."""

    def gather(self, value: str, limit_s: float) -> list[str]:
        """The values of all ranks in rank order, on every rank.

        Raises:
            MissingRanksError: a rank did not take part within `limit_s`; only `abort` may follow.
        """

    def abort(self) -> None:
        """End this rank and all others now, with a non-zero status."""

    def close(self) -> None:
        """No rank needs the others any more."""


class SingleExchange:
    """For a lone rank, which then needs no MPI."""

    uses_master_port = False

    def gather(self, value: str, limit_s: float) -> list[str]:
        return [value]

    def abort(self) -> None:
        os._exit(1)

    def close(self) -> None:
        pass


class MpiExchange:
    """MPI_COMM_WORLD. Bytes travel, not objects: those mpi4py would pickle."""

    uses_master_port = False

    def __init__(self, launcher: Launcher) -> None:
        """Initialize MPI.

        Raises:
            ImportError: there is no mpi4py, or no MPI library.
            ForeignMpiError: the library is not the launcher's.
        """
        import mpi4py

        # Another launcher's library would end the process when it is initialized, or be alone.
        mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # mpi4py's own of the same trouble
            from mpi4py import MPI

        self.library = " ".join(MPI.Get_library_version().split()[:2]).removesuffix(" Version:")
        if not launcher.can_use(self.library):
            raise ForeignMpiError(self.library)
        if not MPI.Is_initialized():
            MPI.Init_thread()
        self._world = MPI.COMM_WORLD
        self._byte = MPI.BYTE

    @property
    def world_size(self) -> int:
        return int(self._world.Get_size())

    def gather(self, value: str, limit_s: float) -> list[str]:
        deadline = time.monotonic() + limit_s
        data = value.encode()
        lengths = array("q", [0]) * self.world_size
        self._finish(self._world.Iallgather(array("q", [len(data)]), lengths), deadline)
        everything = bytearray(sum(lengths))
        parts = [everything, (lengths.tolist(), None), self._byte]
        self._finish(self._world.Iallgatherv([data, self._byte], parts), deadline)
        ends = list(accumulate(lengths))
        return [
            everything[end - length : end].decode()
            for end, length in zip(ends, lengths, strict=True)
        ]

    def abort(self) -> None:
        # Out of reach of the other hosts, MPI may wait for them: then the kernel ends this rank.
        signal.alarm(_ABORT_LIMIT_S)
        self._world.Abort(1)

    def close(self) -> None:
        pass  # mpi4py finalizes MPI when the interpreter ends

    @staticmethod
    def _finish(request: Any, deadline: float) -> None:
        nap_s = 0.0005
        while not request.Test():
            if time.monotonic() > deadline:
                raise MissingRanksError("a rank does not answer over MPI")
            time.sleep(nap_s)
            nap_s = min(2 * nap_s, _LONGEST_NAP_S)
