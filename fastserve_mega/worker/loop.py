"""The worker's loop: receive a plan, copy and compute, report. No torch here."""

from __future__ import annotations

import time
from collections.abc import Callable

import zmq

from fastserve_mega.messaging.codec import MAX_FRAME_BYTES, decode, encode
from fastserve_mega.messaging.messages import (
    CopyResult,
    KeepAlive,
    Message,
    SequencesStarted,
    Shutdown,
    StepCommand,
    StepResult,
    WorkerFailed,
    WorkerReady,
    worker_identity,
)
from fastserve_mega.worker.model_runner import ModelRunner
from fastserve_mega.worker.sequences import PlanError, SequenceTable

_LOOK_AROUND_MS = 500
_LAST_WORDS_MS = 1000


class CoordinatorLostError(Exception):
    """The coordinator has ended, or is out of reach."""


def connect_to_coordinator(
    context: zmq.Context[zmq.Socket[bytes]], endpoint: str, rank: int
) -> zmq.Socket[bytes]:
    """A rank's end of the channel. From now on the coordinator notices when the rank dies."""
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, worker_identity(rank))
    socket.setsockopt(zmq.LINGER, _LAST_WORDS_MS)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.connect(endpoint)
    return socket


class WorkerLoop:
    """One rank's end of the coordinator's plans."""

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        rank: int,
        runner: ModelRunner,
        coordinator_alive: Callable[[], bool],
        *,
        patience_s: float = 120.0,
    ) -> None:
        """Report ready.

        Args:
            socket: connected to the coordinator; `run` closes it.
            rank: of this process among all.
            runner: has loaded its model.
            coordinator_alive: asked twice a second while nothing comes; False ends the loop.
            patience_s: longest silence of the coordinator, which says something all the time.
        """
        self._rank = rank
        self._runner = runner
        self._coordinator_alive = coordinator_alive
        self._copies = runner.copies
        self._sequences = SequenceTable(samples=runner.is_sampling_rank)
        self._socket = socket
        self._patience_s = patience_s
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._copies.fileno(), zmq.POLLIN)
        self._send(WorkerReady(rank, runner.device_blocks, runner.host_blocks, runner.block_bytes))

    def run(self) -> bool:
        """Execute steps until told to end.

        Returns:
            Whether this is a normal end; False when another rank was lost.

        Raises:
            CoordinatorLostError: the coordinator has ended or is silent.
            PlanError: it sent nonsense.
            CopyFailedError: a copy failed; the coordinator has been told.
            Exception: whatever the runner raised; the coordinator has been told.
        """
        try:
            while True:
                match message := self._receive():
                    case StepCommand():
                        self._execute(message)
                    case SequencesStarted():
                        self._sequences.announce(message.started)
                    case Shutdown():
                        return not message.failed
                    case KeepAlive():
                        continue
                    case _:
                        raise PlanError(f"the coordinator sent {type(message).__name__}")
        except CoordinatorLostError:
            raise
        except Exception as error:
            self._send(WorkerFailed(self._rank, f"{type(error).__name__}: {error}"))
            raise
        finally:
            self._socket.close()

    def _execute(self, command: StepCommand) -> None:
        plan = command.plan
        batch = self._sequences.apply(command)
        self._copies.start(plan.copies)
        self._copies.wait(
            [copy.copy_id for copy in plan.copies if copy.precedes_step == plan.step_id]
        )
        if not batch:
            return
        output = self._runner.execute(batch)
        # Copies first: the blocks they free can then be given away in the next plan.
        self._report_copies()
        if self._runner.is_sampling_rank:
            copy_wait_s = self._copies.take_wait_s()
            self._send(
                StepResult(
                    plan.step_id,
                    tuple(output.token_ids),
                    copy_wait_s,
                    output.logprobs,
                    output.failures,
                )
            )

    def _report_copies(self) -> None:
        for done in self._copies.finished():
            self._send(CopyResult(done.copy_id, self._rank, done.copy_s))

    def _receive(self) -> Message:
        give_up_at = time.monotonic() + self._patience_s
        while True:
            ready = dict(self._poller.poll(_LOOK_AROUND_MS))
            if self._copies.fileno() in ready:
                self._report_copies()
            if self._socket in ready:
                return decode(self._socket.recv())
            if not ready and not self._coordinator_alive():
                raise CoordinatorLostError("the coordinator has ended without a word")
            if time.monotonic() > give_up_at:
                raise CoordinatorLostError(
                    f"nothing heard from the coordinator for {self._patience_s:g} s "
                    "(parallel.timeout_s)"
                )

    def _send(self, message: Message) -> None:
        self._socket.send(encode(message), zmq.DONTWAIT)
