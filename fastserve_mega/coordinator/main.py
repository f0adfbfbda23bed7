"""The coordinator process: bind, wait for the ranks, measure, then serve until told to stop."""

from __future__ import annotations

import json
import logging
import os
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path

import zmq

from fastserve_mega.coordinator.assembly import (
    make_coordinator,
    make_profiler,
    make_welcome,
    open_event_logs,
)
from fastserve_mega.coordinator.front_door import FrontDoor
from fastserve_mega.coordinator.profile_file import load_profile, save_profile
from fastserve_mega.coordinator.profiler import measure
from fastserve_mega.coordinator.worker_group import WorkersLostError, ZmqWorkers
from fastserve_mega.logs import discard_output
from fastserve_mega.messaging.frames import client_frame_limit
from fastserve_mega.messaging.rank_messages import STOP_WORD
from fastserve_mega.process_tree import is_running
from fastserve_mega.scheduling.cost_model import Profile
from fastserve_mega.system.config import Config
from fastserve_mega.system.key_file import coordinator_key
from fastserve_mega.types import FinishReason

_LAST_WORDS_MS = 1000
_RANKS_END_S = 5.0
"""When one rank fails while loading, the others end within this time."""
_LOOK_AROUND_MS = 500
"""Signals and a closed stdin are noticed within this time at the latest."""
_NOTICEABLE_S = 1.0
"""No turn takes so long, not even on a busy machine, unless somebody has stopped the process."""

_log = logging.getLogger(__name__)


class AwakeClock:
    """Seconds for which this process was awake.

    A laptop that sleeps, or a container that is frozen, stops ranks and clients as well: none of
    them has been silent, and no step has been slow, for as long as the process itself did nothing.

    Args:
        clock: in seconds; does not go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._asleep_s = 0.0
        self._looked_at = clock()

    def __call__(self) -> float:
        return self._clock() - self._asleep_s

    def look(self, waited_s: float) -> None:
        """Compare with the time of the last call, between which and this one the process worked.

        Args:
            waited_s: how long it may have waited as well.
        """
        now = self._clock()
        if (missing_s := now - self._looked_at - waited_s) > _NOTICEABLE_S:
            self._asleep_s += missing_s
        self._looked_at = now


class StoppedError(Exception):
    """Told to stop."""


class RanksGaveUpError(WorkersLostError):
    """The ranks ended while they were loading; one of them has said why."""


class CoordinatorProcess:
    """Owns the sockets and the order of start and end."""

    def __init__(
        self,
        config: Config,
        *,
        stop_on_stdin_close: bool,
        supervisor: int | None = None,
        epoch: str | None = None,
    ) -> None:
        """Bind both sockets.

        Args:
            config: of the deployment.
            stop_on_stdin_close: end when the parent (rank 0), which holds the other end, is gone.
            supervisor: process that starts everything again when the ranks are lost, so that
                requests can go on.
            epoch: what clients know this start by; None draws one.

        Raises:
            ValueError: the model directory, the configuration or the profile is not usable.
            OSError: a socket cannot be bound, or a file not be opened.
        """
        if config.scheduler.policy == "srpt":
            raise ValueError("scheduler.policy srpt needs to know the future: simulator only")
        self._config = config
        self._welcome = make_welcome(config, epoch, is_supervised=supervisor is not None)
        options = config.coordinator
        self._profile = load_profile(config.scheduler.profile) if config.scheduler.profile else None
        self._event_logs = open_event_logs(options.event_log, config.parallel.data)
        self._context = zmq.Context[zmq.Socket[bytes]]()
        self._front_door = FrontDoor(
            self._context,
            options.client_endpoint,
            buffer=options.client_buffer_messages,
            timeout_s=options.client_timeout_s,
            max_frame_bytes=client_frame_limit(self._welcome.max_context),
            secret_key=coordinator_key(options),
        )
        self._workers = ZmqWorkers(
            self._context,
            options.worker_endpoint,
            replicas=config.parallel.data,
            ranks_per_replica=config.parallel.replica_size,
            silence_limit_s=min(config.parallel.timeout_s, config.supervisor.hang_limit_s),
        )
        self._supervisor = supervisor
        self._stop = False
        self._clock = AwakeClock()
        self._poller = zmq.Poller()
        self._poller.register(self._workers.socket, zmq.POLLIN)
        self._stop_on_stdin_close = stop_on_stdin_close
        self._stdin = sys.stdin.fileno() if stop_on_stdin_close else None
        if self._stdin is not None:
            self._poller.register(self._stdin, zmq.POLLIN)

    def addresses(self) -> dict[str, str]:
        """Where it listens: for the clients, and for the ranks."""
        return {"client": self._front_door.endpoint, "worker": self._workers.endpoint}

    def announce(self) -> None:
        """Tell the parent the addresses, as one line of JSON on stdout."""
        try:
            print(json.dumps(self.addresses()), flush=True)
        except BrokenPipeError:
            discard_output()  # the parent has ended, as its end of stdin tells

    def stop(self, *_: object) -> None:
        """Drain and end; also the signal handler."""
        self._stop = True

    def run(self) -> None:
        """Serve until told to stop.

        Raises:
            WorkersLostError: a rank failed; all clients have been told.
        """
        self._with_ranks(self._serve)

    def write_profile(self, path: Path) -> bool:
        """Measure the step times of the ranks thoroughly, and end.

        Returns:
            Whether the file was written; False when told to stop before.

        Raises:
            WorkersLostError: a rank failed.
            OSError: the file cannot be written.
        """
        return self._with_ranks(lambda: save_profile(self._measure(), path))

    def _with_ranks(self, work: Callable[[], None]) -> bool:
        """Wait for the ranks, work, and end them; False when told to stop before it was done."""
        failed = True
        try:
            self._await_ranks()
            work()
            failed = False
            return True
        except StoppedError:
            failed = False
            return False
        finally:
            self._workers.shut_down(failed=failed)
            self._workers.close()
            self._front_door.close()
            self._context.destroy(linger=_LAST_WORDS_MS)
            for event_log in self._event_logs:
                if event_log:
                    event_log.close()

    def _await_ranks(self) -> None:
        try:
            self._await_ready()
        except WorkersLostError as error:
            if self._rank_0_ends():
                raise RanksGaveUpError(str(error)) from None
            raise

    def _rank_0_ends(self) -> bool:
        """Wait a moment for rank 0 to end; whether it has."""
        if self._stdin is None:
            return self._stop_on_stdin_close
        return bool(select.select([self._stdin], [], [], _RANKS_END_S)[0])

    def _await_ready(self) -> None:
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
            self._workers.receive()

    def _measure(self) -> Profile:
        def look_around() -> None:
            self._poll(0)
            if self._stop:
                raise StoppedError

        profiler = make_profiler(self._config, self._welcome, self._workers.groups[0])
        return measure(profiler, look_around)

    def _serve(self) -> None:
        coordinator = make_coordinator(
            self._config,
            self._welcome,
            self._front_door,
            self._workers.groups,
            profile=self._profile,
            event_logs=self._event_logs,
            clock=self._clock,
            poll=self._poll_until,
        )
        self._poller.register(self._front_door.socket, zmq.POLLIN)
        _log.info("serving %s on %s", self._welcome.model_name, self._front_door.endpoint)
        try:
            while not self._stop:
                coordinator.turn()
            coordinator.drain()
            deadline = time.monotonic() + self._config.coordinator.drain_timeout_s
            while coordinator.num_unfinished and time.monotonic() < deadline:
                coordinator.turn()
            coordinator.end_all(FinishReason.ERROR, "the server was shut down")
        except WorkersLostError as error:
            # Killed with its ranks, or once it stops, the supervisor keeps no promise.
            if self._supervisor is not None and not self._stop and is_running(self._supervisor):
                coordinator.announce_restart(self._welcome.restart_within_s, str(error))
            else:
                coordinator.end_all(FinishReason.ERROR, str(error))
            raise

    def _poll_until(self, deadline: float | None) -> None:
        wait_ms = float(_LOOK_AROUND_MS)
        if deadline is not None:
            wait_ms = min(max((deadline - self._clock()) * 1000 + 1, 0), wait_ms)
        self._poll(int(wait_ms))

    def _poll(self, wait_ms: int) -> None:
        ready = dict(self._poller.poll(wait_ms))
        self._clock.look(wait_ms / 1000)
        self._workers.keep_alive()
        if self._stdin is not None and self._stdin in ready:
            asked = os.read(self._stdin, len(STOP_WORD)) == STOP_WORD
            self._poller.unregister(self._stdin)
            self._stdin = None
            if not asked:
                self._workers.hear_last_words()
                raise WorkersLostError("rank 0 has ended")
            self._stop = True
