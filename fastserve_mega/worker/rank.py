"""The worker process: one rank, from the launcher's environment to the last step."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Literal

import zmq
from msgspec import structs

from fastserve_mega.models.architecture import load_architecture
from fastserve_mega.process_tree import die_with_parent
from fastserve_mega.system.config import Config
from fastserve_mega.system.locate import resolve_model
from fastserve_mega.system.partition import check_partition
from fastserve_mega.worker.coordinator_child import CoordinatorChild
from fastserve_mega.worker.exchange import MissingRanksError
from fastserve_mega.worker.fake_runner import FakeModelRunner
from fastserve_mega.worker.loop import CoordinatorLostError, WorkerLoop, connect_to_coordinator
from fastserve_mega.worker.model_runner import ModelRunner
from fastserve_mega.worker.network import choose_master, endpoint_for_other_hosts, lead_gloo
from fastserve_mega.worker.rank_group import (
    OthersFailedError,
    RankGroup,
    SaidError,
    describe,
    is_expected,
)
from fastserve_mega.worker.rendezvous import make_exchange
from fastserve_mega.worker.topology import Topology, find_launcher, read_topology

RunnerName = Literal["megatron", "fake"]
OnReady = Callable[[str, Callable[[], None]], object]
"""Takes the coordinator's address for clients, and what ends all ranks."""
_FAKE_BLOCKS = 1024
_LAST_WORDS_MS = 1000
_LET_OTHERS_SPEAK_S = 2.0

_log = logging.getLogger(__name__)


def run_worker(
    config: Config,
    coordinator_arguments: Sequence[str],
    runner: RunnerName,
    *,
    supervised: bool = False,
    on_ready: OnReady = lambda _endpoint, _stop: None,
) -> int:
    """Entry point of a rank; returns its exit status.

    Args:
        config: of the deployment, the same on all ranks.
        coordinator_arguments: for the coordinator that rank 0 starts.
        runner: what computes tokens; `fake` needs no model and is for tests.
        supervised: SIGTERM means that another rank has died, which mpirun tells in this way, and
            SIGUSR1 asks to stop.
        on_ready: called by rank 0 before its first step.
    """
    try:
        topology = read_topology()
        if supervised or (topology.launcher and topology.launcher.is_process):
            die_with_parent()
        exchange = make_exchange(topology, config.parallel.timeout_s)
    except (ValueError, ImportError, OSError, MissingRanksError) as error:
        return _fail_alone(error)
    ranks = RankGroup(topology, exchange, config.parallel.timeout_s)
    rank = _Rank(config, ranks, runner)
    try:
        rank.prepare(coordinator_arguments, supervised=supervised)
    except OthersFailedError:
        rank.drop_coordinator()
        return 1
    except Exception as error:
        rank.drop_coordinator()
        if not is_expected(error) and not isinstance(error, SaidError):
            _log.exception("rank %d cannot start", topology.rank)
        ranks.fail(error)
        return 1
    return rank.serve(on_ready)


def _fail_alone(error: Exception) -> int:
    """Give up where the other ranks cannot be told: the first of each host speaks.

    When it ends, the launcher ends the rest.
    """
    launcher = find_launcher(os.environ)
    if launcher and os.environ.get(launcher.local_rank, "0") != "0":
        time.sleep(_LET_OTHERS_SPEAK_S)
        _log.info("%s", error)
    else:
        _log.error("%s", error)
    return 2 if isinstance(error, ValueError | ImportError) else 1


def _check(config: Config, topology: Topology) -> None:
    """What can be known to be wrong before anything is loaded.

    Raises:
        ValueError, OSError: the message names the value and the limit.
    """
    wanted = config.parallel.world_size
    if topology.world_size != wanted:
        raise ValueError(
            f"the configuration wants {wanted} ranks (parallel.data {config.parallel.data} x "
            f"pipeline {config.parallel.pipeline} x tensor {config.parallel.tensor}), the "
            f"launcher started {topology.world_size}"
        )
    check_partition(load_architecture(config.model.directory), config.parallel)


def _resolve_model(config: Config, ranks: RankGroup, *, weights: bool) -> Config:
    """One rank per host downloads the model if need be; then the others find it there."""
    if ranks.topology.local_rank == 0:
        resolve_model(config.model, weights=weights)
    ranks.gather()  # the others wait here
    return structs.replace(config, model=resolve_model(config.model, weights=weights))


class _Rank:
    """The parts of one rank and the order of their start and end."""

    def __init__(self, config: Config, ranks: RankGroup, runner: RunnerName) -> None:
        self._config = config
        self._ranks = ranks
        self._runner_name = runner
        self._child: CoordinatorChild | None = None
        self._parent = os.getppid()
        self._stop_requested = False
        self._context = zmq.Context[zmq.Socket[bytes]]()

    @property
    def _topology(self) -> Topology:
        return self._ranks.topology

    def prepare(self, coordinator_arguments: Sequence[str], *, supervised: bool) -> None:
        """All up to the first step. An exception means that no rank can go on.

        Raises:
            OthersFailedError: other ranks failed.
            Exception: this one did.
        """
        ranks = self._ranks
        ranks.agree(self._config)
        weights = self._runner_name == "megatron"
        self._config = _resolve_model(self._config, ranks, weights=weights)
        _check(self._config, self._topology)
        ranks.gather()  # all are fine: nothing was started in vain
        self._handle_signals(supervised=supervised)
        replica_size = self._config.parallel.replica_size
        endpoint = master = ""
        if self._topology.rank % replica_size == 0:
            master = self._choose_master()
        if self._topology.rank == 0:
            endpoint = self._start_coordinator(coordinator_arguments, master)
        endpoint = ranks.broadcast(endpoint)
        master = ranks.gather(master)[self._topology.rank // replica_size * replica_size]
        lead_gloo(master.rpartition(":")[0])
        # Connected before the model is loaded: so the coordinator sees who dies meanwhile.
        socket = connect_to_coordinator(self._context, endpoint, self._topology.rank)
        with self._child.watched(self._give_up_loading) if self._child else nullcontext():
            self._runner = self._make_runner(master)
        self._loop = WorkerLoop(
            socket,
            self._topology.rank,
            self._runner,
            self._coordinator_alive,
            patience_s=self._config.parallel.timeout_s,
        )

    def serve(self, on_ready: OnReady) -> int:
        """Execute steps until told to end; returns the exit status."""
        if self._child:
            on_ready(self._child.client_endpoint, self._request_stop)
        try:
            is_normal_end = self._loop.run()
        except CoordinatorLostError as error:
            # All ranks of a host find out at once.
            self._ranks.speak_and_abort("" if self._topology.local_rank else str(error))
            return 1
        except Exception as error:
            if not is_expected(error):
                _log.exception("rank %d failed", self._topology.rank)
            self._context.destroy(linger=_LAST_WORDS_MS)
            self._ranks.speak_and_abort(describe(error) if is_expected(error) else "")
            return 1
        # Not term(), which would wait for ever for a socket left open by an exception.
        self._context.destroy(linger=_LAST_WORDS_MS)
        if not is_normal_end:
            if self._child:
                self._child.join()  # it says why
            self._ranks.abort()
        self._runner.close()
        status = self._child.join() if self._child else 0
        self._ranks.close()
        return status

    def drop_coordinator(self) -> None:
        """The ranks give up and say why; it has nothing to add."""
        if self._child:
            self._child.kill()

    def _choose_master(self) -> str:
        """Where the ranks of this replica meet; MASTER_PORT is for the first one."""
        free = self._topology.rank == 0 and not self._ranks.uses_master_port
        return choose_master(self._topology, port_is_free=free)

    def _start_coordinator(self, arguments: Sequence[str], master: str) -> str:
        """Returns its address for the ranks."""
        arguments = list(arguments)
        if self._topology.has_several_hosts:
            own, wanted = master.rpartition(":")[0], self._config.coordinator.worker_endpoint
            endpoint = endpoint_for_other_hosts(wanted, own)
            arguments += ["--set", f"coordinator.worker_endpoint={endpoint}"]
        self._child = CoordinatorChild(arguments)
        if self._stop_requested:
            self._child.request_stop()
        return self._child.worker_endpoint

    def _handle_signals(self, *, supervised: bool) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # signals are the program's that this rank is a part of
        # Signals reach all ranks; rank 0 lets the coordinator drain, which then ends them all.
        signal.signal(signal.SIGINT, self._request_stop)
        signal.signal(signal.SIGUSR1, self._request_stop)
        signal.signal(signal.SIGTERM, self._report_loss if supervised else self._request_stop)

    def _give_up_loading(self) -> None:
        """The coordinator ended, with a word or because it was told to: no use to go on loading."""
        self._ranks.abort()

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
                looks_ahead=config.parallel.looks_ahead,
            )
        # Imported late: torch takes seconds, and fake ranks need none.
        from fastserve_mega.worker.megatron.initialize import name_of_device
        from fastserve_mega.worker.megatron.megatron_runner import MegatronRunner

        self._ranks.share_no_device(name_of_device(config.parallel, topology))
        address, _, port = master.rpartition(":")
        return MegatronRunner(config, topology, address, int(port))

    def _coordinator_alive(self) -> bool:
        # Rank 0 watches its child; the others end with rank 0, and notice when orphaned.
        return self._child.is_alive() if self._child else os.getppid() == self._parent

    def _request_stop(self, *_: object) -> None:
        self._stop_requested = True
        if self._child:
            self._child.request_stop()

    def _report_loss(self, *_: object) -> None:
        if self._child:
            self._child.report_loss()
