"""The worker's loop: receive a step, execute it, report. No torch here."""

from __future__ import annotations

from collections.abc import Callable

import zmq

from fastserve_mega.messaging.codec import MAX_FRAME_BYTES, decode, encode
from fastserve_mega.messaging.messages import (
    Message,
    Shutdown,
    StepCommand,
    StepResult,
    WorkerFailed,
    WorkerReady,
)
from fastserve_mega.worker.runner import ModelRunner
from fastserve_mega.worker.sequences import PlanError, SequenceTable

_LOOK_AROUND_MS = 500
_LAST_WORDS_MS = 1000


class WorkerLoop:
    """One rank's end of the coordinator's plans."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        rank: int,
        runner: ModelRunner,
        coordinator_alive: Callable[[], bool],
    ) -> None:
        """Connect and report ready.

        Args:
            context: of this process.
            endpoint: the coordinator's address for workers.
            rank: of this process among all.
            runner: has loaded its model.
            coordinator_alive: asked twice a second while nothing comes; False ends the loop.
        """
        self._rank = rank
        self._runner = runner
        self._coordinator_alive = coordinator_alive
        self._sequences = SequenceTable()
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, f"rank-{rank}".encode())
        self._socket.setsockopt(zmq.LINGER, _LAST_WORDS_MS)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.connect(endpoint)
        self._send(WorkerReady(rank, runner.device_blocks))

    def run(self) -> None:
        """Execute steps until told to end.

        Raises:
            PlanError: the coordinator died or sent nonsense.
            Exception: whatever the runner raised; the coordinator has been told.
        """
        try:
            while True:
                match message := self._receive():
                    case StepCommand():
                        self._execute(message)
                    case Shutdown():
                        return
                    case _:
                        raise PlanError(f"the coordinator sent {type(message).__name__}")
        except Exception as error:
            self._send(WorkerFailed(self._rank, f"{type(error).__name__}: {error}"))
            raise
        finally:
            self._socket.close()

    def _execute(self, command: StepCommand) -> None:
        token_ids = self._runner.execute(self._sequences.apply(command))
        if self._runner.is_sampling_rank:
            self._send(StepResult(command.plan.step_id, tuple(token_ids)))

    def _receive(self) -> Message:
        while not self._socket.poll(_LOOK_AROUND_MS):
            if not self._coordinator_alive():
                raise PlanError("the coordinator has ended without a word")
        return decode(self._socket.recv(), trusted=True)

    def _send(self, message: Message) -> None:
        self._socket.send(encode(message), zmq.DONTWAIT)
