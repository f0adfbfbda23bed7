"""The worker process: one rank, from the launcher's environment to the last step."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import signal
from collections.abc import Sequence
from typing import Literal

import zmq

import fastserve_mega
from fastserve_mega.config import Config
from fastserve_mega.models.architecture import load_architecture
from fastserve_mega.models.locate import resolve_model
from fastserve_mega.worker.coordinator_child import CoordinatorChild
from fastserve_mega.worker.exchange import Exchange, choose_master, make_exchange
from fastserve_mega.worker.fake_runner import FakeModelRunner
from fastserve_mega.worker.loop import WorkerLoop
from fastserve_mega.worker.runner import ModelRunner
from fastserve_mega.worker.topology import Topology, read_topology

RunnerName = Literal["megatron", "fake"]
_FAKE_BLOCKS = 1024
_LAST_WORDS_MS = 1000

_log = logging.getLogger(__name__)


def run_worker(
    config: Config,
    coordinator_arguments: Sequence[str],
    runner: RunnerName,
    *,
    supervised: bool = False,
) -> int:
    """Entry point of a rank; returns its exit status.

    Args:
        config: of the deployment, the same on all ranks.
        coordinator_arguments: for the coordinator that rank 0 starts.
        runner: what computes tokens; `fake` needs no model and is for tests.
        supervised: SIGTERM means that another rank has died, which mpirun tells in this way, and
            SIGUSR1 asks to stop.
    """
    try:
        topology = read_topology()
        exchange = make_exchange(topology)
    except (ValueError, ImportError) as error:
        _log.error("%s", error)
        return 2
    try:
        _check_agreement(config, topology, exchange)
        config = _resolve_model(config, topology, exchange, weights=runner == "megatron")
        rank = _Rank(config, topology, exchange, runner)
        rank.handle_signals(supervised=supervised)
        return rank.run(coordinator_arguments)
    except Exception as error:
        # One sentence from the rank that knows; the others are ended with it.
        expected = isinstance(error, (ValueError, OSError))
        _log.error("rank %d: %s", topology.rank, error, exc_info=not expected)
        exchange.abort()
        raise


def _check_agreement(config: Config, topology: Topology, exchange: Exchange) -> None:
    """All ranks must have been given the same configuration, code and number of ranks."""
    wanted = config.parallel.world_size
    if topology.world_size != wanted:
        raise ValueError(
            f"the configuration wants {wanted} ranks (parallel.data {config.parallel.data} x "
            f"pipeline {config.parallel.pipeline} x tensor {config.parallel.tensor}), the "
            f"launcher started {topology.world_size}"
        )
    said = f"{fastserve_mega.__version__} {config!r}"
    hashes = exchange.gather(hashlib.sha256(said.encode()).hexdigest())
    different = [rank for rank, value in enumerate(hashes) if value != hashes[0]]
    if different:
        raise ValueError(f"ranks {different} have a configuration or version unlike rank 0's")


def _resolve_model(
    config: Config, topology: Topology, exchange: Exchange, *, weights: bool
) -> Config:
    """One rank per host downloads the model if need be; then the others find it there."""
    if topology.local_rank == 0:
        config = _with_local_model(config, weights=weights)
    exchange.gather("")  # the others wait here
    return _with_local_model(config, weights=weights)


def _with_local_model(config: Config, *, weights: bool) -> Config:
    return dataclasses.replace(config, model=resolve_model(config.model, weights=weights))


class _Rank:
    """The parts of one rank and the order of their start and end."""

    def __init__(
        self, config: Config, topology: Topology, exchange: Exchange, runner: RunnerName
    ) -> None:
        self._config = config
        self._topology = topology
        self._exchange = exchange
        self._runner_name = runner
        self._child: CoordinatorChild | None = None

    def handle_signals(self, *, supervised: bool) -> None:
        # Signals reach all ranks; rank 0 lets the coordinator drain, which then ends them all.
        signal.signal(signal.SIGINT, self._request_stop)
        signal.signal(signal.SIGUSR1, self._request_stop)
        signal.signal(signal.SIGTERM, self._report_loss if supervised else self._request_stop)

    def run(self, coordinator_arguments: Sequence[str]) -> int:
        endpoint = master = ""
        if self._topology.rank == 0:
            self._child = CoordinatorChild(coordinator_arguments)
            endpoint = self._child.worker_endpoint
        replica_size = self._config.parallel.replica_size
        if self._topology.rank % replica_size == 0:
            master = choose_master(self._topology)
        endpoint = self._exchange.broadcast(endpoint)
        masters = self._exchange.gather(master)[::replica_size]
        runner = self._make_runner(masters[self._topology.rank // replica_size])
        context = zmq.Context[zmq.Socket[bytes]]()
        try:
            loop = WorkerLoop(
                context, endpoint, self._topology.rank, runner, self._coordinator_alive
            )
            loop.run()
        finally:
            # Not term(), which would wait for ever for a socket left open by an exception.
            context.destroy(linger=_LAST_WORDS_MS)
        runner.close()
        return self._child.join() if self._child else 0

    def _make_runner(self, master: str) -> ModelRunner:
        config = self._config
        topology = self._topology.within_replica(config.parallel.replica_size)
        if self._runner_name == "fake":
            settings = config.kv_cache
            host_blocks = settings.host_blocks if settings.host_blocks is not None else _FAKE_BLOCKS
            return FakeModelRunner(
                device_blocks=settings.device_blocks or _FAKE_BLOCKS,
                block_size=settings.block_size,
                vocab_size=load_architecture(config.model.directory).vocab_size,
                host_blocks=host_blocks if settings.swap.uses_host else 0,
                is_sampling_rank=topology.rank == topology.world_size - 1,
            )
        # Imported late: torch takes seconds, and fake ranks need none.
        from fastserve_mega.worker.megatron.runner import MegatronRunner

        address, _, port = master.rpartition(":")
        return MegatronRunner(config, topology, address, int(port))

    def _coordinator_alive(self) -> bool:
        # Rank 0 watches its child; the others end with rank 0, and notice when orphaned.
        return self._child.is_alive() if self._child else os.getppid() != 1

    def _request_stop(self, *_: object) -> None:
        if self._child:
            self._child.request_stop()

    def _report_loss(self, *_: object) -> None:
        if self._child:
            self._child.report_loss()
