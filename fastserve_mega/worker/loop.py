"""The worker's loop: receive a plan, copy and compute, report. No torch here."""

from __future__ import annotations

from collections.abc import Callable

import zmq

from fastserve_mega.messaging.codec import MAX_FRAME_BYTES, decode, encode
from fastserve_mega.messaging.messages import (
    CopyResult,
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
        self._copies = runner.copies
        self._sequences = SequenceTable(samples=runner.is_sampling_rank)
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, f"rank-{rank}".encode())
        self._socket.setsockopt(zmq.LINGER, _LAST_WORDS_MS)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.connect(endpoint)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._copies.fileno(), zmq.POLLIN)
        self._send(WorkerReady(rank, runner.device_blocks, runner.host_blocks, runner.block_bytes))

    def run(self) -> None:
        """Execute steps until told to end.

        Raises:
            PlanError: the coordinator died or sent nonsense.
            CopyFailedError: a copy failed; the coordinator has been told.
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
        while True:
            ready = dict(self._poller.poll(_LOOK_AROUND_MS))
            if self._copies.fileno() in ready:
                self._report_copies()
            if self._socket in ready:
                return decode(self._socket.recv(), trusted=True)
            if not ready and not self._coordinator_alive():
                raise PlanError("the coordinator has ended without a word")

    def _send(self, message: Message) -> None:
        self._socket.send(encode(message), zmq.DONTWAIT)
