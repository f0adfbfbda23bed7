"""The exchange of ranks without MPI: a key-value store of torch at MASTER_ADDR:MASTER_PORT."""

from __future__ import annotations

import os
import signal
import threading
import time
from datetime import timedelta
from typing import Any

# Public, but without types.
from torch.distributed import (  # type: ignore[attr-defined]
    DistError,
    DistNetworkError,
    PrefixStore,
    TCPStore,
)

from fastserve_mega.worker.exchange import MissingRanksError
from fastserve_mega.worker.network import is_loopback, listen_at
from fastserve_mega.worker.topology import Topology

_ABORTED = "aborted"
_LEFT = "left"
_ABORT_LIMIT_S = 5
_LAST_GOODBYE_S = 5.0
_WATCH_INTERVAL_S = 0.5
_NAP_S = 0.02


class StoreExchange:
    """Values travel as text through the store; a thread of each rank watches for an abort.

    torchrun's agent on the first host keeps a store there already; otherwise rank 0 does.

    Raises:
        ValueError: the port is taken, or nobody answers there in time.
    """

    uses_master_port = True

    def __init__(self, topology: Topology, limit_s: float) -> None:
        self._rank = topology.rank
        self._world_size = topology.world_size
        self._host, self._port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._is_host = topology.rank == 0 and not has_agent
        # The names of an earlier start of the same ranks are still there.
        self._prefix = f"fastserve_mega/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._limit_s = limit_s
        self._store = self._connect(is_host=self._is_host)
        self._calls = 0
        self._leaving = threading.Event()
        # A connection of its own: calls on the same one wait for each other.
        watched = self._connect(is_host=False)
        self._watcher = threading.Thread(target=self._watch, args=(watched,), daemon=True)
        self._watcher.start()

    def gather(self, value: str, limit_s: float) -> list[str]:
        keys = [f"{self._calls}/{rank}" for rank in range(self._world_size)]
        self._calls += 1
        try:
            self._store.set(keys[self._rank], value)
            self._store.wait(keys, timedelta(seconds=limit_s))
            return [bytes(self._store.get(key)).decode() for key in keys]
        except DistNetworkError:
            raise MissingRanksError(
                f"the store at {self._host}:{self._port} (MASTER_ADDR, MASTER_PORT) has gone"
            ) from None
        except DistError:
            missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
            raise MissingRanksError(
                f"ranks {missing} of {self._world_size} have not come within {limit_s:g} s"
            ) from None

    def abort(self) -> None:
        # Should the store not answer, the kernel ends this rank.
        signal.alarm(_ABORT_LIMIT_S)
        try:
            self._store.set(_ABORTED, "")
        finally:
            os._exit(1)

    def close(self) -> None:
        self._leaving.set()
        self._watcher.join()
        left = self._store.add(_LEFT, 1)
        deadline = time.monotonic() + _LAST_GOODBYE_S
        # The store ends with its host, which the others would take for the loss of rank 0.
        while self._is_host and left < self._world_size and time.monotonic() < deadline:
            time.sleep(_NAP_S)
            left = self._store.add(_LEFT, 0)

    def _connect(self, *, is_host: bool) -> Any:
        listener = None
        if is_host and is_loopback(self._host):
            # Another name may have another address here than on the other hosts.
            try:
                listener = listen_at(self._host, _port(self._port))
            except OSError:
                raise ValueError(f"MASTER_PORT {self._port} is in use on this host") from None
        try:
            store = TCPStore(
                self._host,
                _port(self._port),
                self._world_size,
                is_master=is_host,
                timeout=timedelta(seconds=self._limit_s),
                wait_for_workers=False,
                master_listen_fd=listener,
            )
        except DistError as error:
            if is_host and "EADDRINUSE" in str(error):
                raise ValueError(f"MASTER_PORT {self._port} is in use on this host") from None
            raise ValueError(
                f"nobody answers at {self._host}:{self._port} (MASTER_ADDR, MASTER_PORT) within "
                f"{self._limit_s:g} s (parallel.timeout_s)"
            ) from None
        return PrefixStore(self._prefix, store)

    def _watch(self, store: Any) -> None:
        """End this process when a rank aborts or the store is lost."""
        while not self._leaving.wait(_WATCH_INTERVAL_S):
            try:
                if not store.check([_ABORTED]):
                    continue
            except DistError:
                pass
            if not self._leaving.is_set():
                os._exit(1)


def _port(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"MASTER_PORT must be a number, got {text!r}") from None
