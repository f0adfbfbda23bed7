"""The coordinator process: bind, wait for the ranks, measure, then serve until told to stop."""

from __future__ import annotations

import json
import logging
import signal
import sys
import time
import uuid

import zmq

from fastserve_mega.config import Config
from fastserve_mega.coordinator.admission import Admission
from fastserve_mega.coordinator.coordinator import Coordinator
from fastserve_mega.coordinator.front_door import FrontDoor
from fastserve_mega.coordinator.profiler import ProfileLimits, Profiler
from fastserve_mega.coordinator.worker_group import WorkersLostError, ZmqWorkerGroup
from fastserve_mega.messaging.messages import Welcome
from fastserve_mega.metrics import ServingMetrics
from fastserve_mega.models.architecture import load_architecture
from fastserve_mega.scheduling.cost_model import ProfiledCostModel
from fastserve_mega.scheduling.memory import PoolSizes
from fastserve_mega.scheduling.scheduler import Scheduler
from fastserve_mega.types import FinishReason

_LAST_WORDS_MS = 1000
_LOOK_AROUND_MS = 500
"""Signals and a closed stdin are noticed within this time at the latest."""

_log = logging.getLogger(__name__)


class StoppedError(Exception):
    """Told to stop."""


class CoordinatorProcess:
    """Owns the sockets and the order of start and end."""

    def __init__(self, config: Config, *, stop_on_stdin_close: bool) -> None:
        """Bind both sockets.

        Args:
            config: of the deployment.
            stop_on_stdin_close: end when the parent (rank 0), which holds the other end, is gone.

        Raises:
            ValueError: the model directory or the configuration is not usable.
            OSError: a socket cannot be bound.
        """
        if config.scheduler.policy == "srpt":
            raise ValueError("scheduler.policy srpt needs to know the future: simulator only")
        self._config = config
        self._welcome = _describe(config)
        self._context = zmq.Context[zmq.Socket[bytes]]()
        options = config.coordinator
        self._front_door = FrontDoor(
            self._context,
            options.client_endpoint,
            buffer=options.client_buffer_messages,
            timeout_s=options.client_timeout_s,
        )
        self._workers = ZmqWorkerGroup(
            self._context, options.worker_endpoint, config.parallel.world_size
        )
        self._stop = False
        self._poller = zmq.Poller()
        self._poller.register(self._workers.socket, zmq.POLLIN)
        self._stdin = sys.stdin.fileno() if stop_on_stdin_close else None
        if self._stdin is not None:
            self._poller.register(self._stdin, zmq.POLLIN)

    def announce(self) -> None:
        """Tell the parent the addresses, as one line of JSON on stdout."""
        addresses = {"client": self._front_door.endpoint, "worker": self._workers.endpoint}
        print(json.dumps(addresses), flush=True)

    def stop(self, *_: object) -> None:
        """Drain and end; also the signal handler."""
        self._stop = True

    def run(self) -> None:
        """Serve until told to stop.

        Raises:
            WorkersLostError: a rank failed; all clients have been told.
        """
        try:
            self._await_ranks()
            coordinator = self._make_coordinator()
            self._poller.register(self._front_door.socket, zmq.POLLIN)
            _log.info("serving %s on %s", self._welcome.model_name, self._front_door.endpoint)
            self._serve(coordinator)
        except StoppedError:
            pass
        finally:
            self._workers.shut_down()
            self._workers.close()
            self._front_door.close()
            self._context.destroy(linger=_LAST_WORDS_MS)

    def _await_ranks(self) -> None:
        limit_s = self._config.coordinator.startup_timeout_s
        deadline = time.monotonic() + limit_s
        while not self._workers.all_ready:
            self._poll(_LOOK_AROUND_MS)
            if self._stop:
                raise StoppedError
            if time.monotonic() > deadline:
                raise WorkersLostError(
                    f"ranks {self._workers.missing_ranks} are not ready after {limit_s:g} s "
                    "(coordinator.startup_timeout_s)"
                )
            for _ in self._workers.results():
                pass  # nothing but WorkerReady can come, which the group keeps

    def _make_coordinator(self) -> Coordinator:
        config = self._config
        profiler = Profiler(
            self._workers,
            ProfileLimits(
                device_blocks=self._workers.device_blocks,
                block_size=config.kv_cache.block_size,
                max_batch_size=config.scheduler.max_batch_size,
                max_batch_tokens=config.scheduler.max_batch_tokens,
                max_context=self._welcome.max_context,
            ),
            config.coordinator.step_timeout_s,
        )
        profile = profiler.self_measurement()
        _log.info("self-measurement: %s", profile)
        scheduler = Scheduler(
            config.scheduler,
            ProfiledCostModel(profile),
            PoolSizes(
                device_blocks=self._workers.device_blocks,
                host_blocks=self._workers.host_blocks,
                block_size=config.kv_cache.block_size,
            ),
            swap=config.kv_cache.swap,
            window=config.parallel.pipeline,
            first_step_id=profiler.steps,
        )
        metrics = ServingMetrics(block_bytes=self._workers.block_bytes)
        metrics.watch_scheduler(scheduler)
        admission = Admission(
            vocab_size=self._welcome.vocab_size,
            max_context=self._welcome.max_context,
            max_queued_requests=config.scheduler.max_queued_requests,
            scheduler=scheduler,
        )
        return Coordinator(
            config=config.coordinator,
            welcome=self._welcome,
            scheduler=scheduler,
            front_door=self._front_door,
            workers=self._workers,
            world_size=config.parallel.world_size,
            metrics=metrics,
            admission=admission,
            clock=time.monotonic,
        )

    def _serve(self, coordinator: Coordinator) -> None:
        try:
            while not self._stop:
                self._turn(coordinator)
            coordinator.drain()
            deadline = time.monotonic() + self._config.coordinator.drain_timeout_s
            while coordinator.unfinished and time.monotonic() < deadline:
                self._turn(coordinator)
            coordinator.end_all(FinishReason.ERROR, "the server was shut down")
        except WorkersLostError as error:
            coordinator.end_all(FinishReason.ERROR, str(error))
            raise

    def _turn(self, coordinator: Coordinator) -> None:
        deadline = coordinator.next_deadline()
        wait_ms = float(_LOOK_AROUND_MS)
        if deadline is not None:
            wait_ms = min(max((deadline - time.monotonic()) * 1000 + 1, 0), wait_ms)
        self._poll(int(wait_ms))
        coordinator.run_once()

    def _poll(self, wait_ms: int) -> None:
        ready = dict(self._poller.poll(wait_ms))
        if self._stdin is not None and self._stdin in ready:
            # Nobody writes to it: readable means that the parent has closed it.
            self._poller.unregister(self._stdin)
            self._stdin = None
            self._stop = True


def _describe(config: Config) -> Welcome:
    architecture = load_architecture(config.model.directory)
    limit = config.model.max_context
    if limit is not None and limit > architecture.max_context:
        raise ValueError(f"model.max_context is {limit}, the model has {architecture.max_context}")
    return Welcome(
        epoch=uuid.uuid4().hex,
        model_name=config.model.name,
        model_path=str(config.model.directory.resolve()),
        max_context=limit or architecture.max_context,
        vocab_size=architecture.vocab_size,
        eos_token_ids=architecture.eos_token_ids,
    )


def run_coordinator(config: Config, *, stop_on_stdin_close: bool) -> int:
    """Entry point of the process; returns its exit status."""
    try:
        process = CoordinatorProcess(config, stop_on_stdin_close=stop_on_stdin_close)
    except (ValueError, OSError) as error:
        _log.error("%s", error)
        return 2
    signal.signal(signal.SIGTERM, process.stop)
    signal.signal(signal.SIGINT, process.stop)
    process.announce()
    try:
        process.run()
    except WorkersLostError as error:
        _log.error("workers lost: %s", error)
        return 1
    return 0
