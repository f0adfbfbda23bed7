"""The worker's loop: receive a plan, copy and compute, report. No torch here."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import zmq

from fastserve_mega import faults
from fastserve_mega.messaging.frames import (
    MAX_FRAME_BYTES,
    connect,
    decode,
    encode,
    worker_identity,
)
from fastserve_mega.messaging.messages import Message
from fastserve_mega.messaging.rank_messages import (
    CopyResult,
    KeepAlive,
    SequencesStarted,
    Shutdown,
    StepCommand,
    StepResult,
    WorkerFailed,
    WorkerReady,
)
from fastserve_mega.worker.look_ahead import LaunchAhead, LookAhead
from fastserve_mega.worker.model_runner import (
    ModelRunner,
    PlanError,
    SequenceInput,
    SequenceTable,
    StepOutput,
    Verdict,
)
from fastserve_mega.worker.rank_group import describe

_LOOK_AROUND_MS = 500
_LAST_WORDS_MS = 1000


class CoordinatorLostError(Exception):
    """The coordinator has ended, or is out of reach."""


def connect_to_coordinator(
    context: zmq.Context[zmq.Socket[bytes]], endpoint: str, rank: int
) -> zmq.Socket[bytes]:
    """A rank's end of the channel. From now on the coordinator notices when the rank dies.

    Args:
        context: of this process.
        endpoint: of the coordinator, with its key if it has one (`with_key`).
        rank: of this process among all.
    """
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, worker_identity(rank))
    socket.setsockopt(zmq.LINGER, _LAST_WORDS_MS)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    socket.setsockopt(zmq.RCVHWM, 0)
    connect(socket, endpoint)
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
        self._send_frame = faults.at("rank.send", self._put)
        self._receive_frame = faults.at("rank.receive", socket.recv)
        self._compute = faults.at("rank.before_step", runner.execute)
        compute_ahead = faults.at("rank.before_step", runner.execute_ahead)
        ahead = LookAhead(compute_ahead, runner.block_size)
        self._look_ahead = ahead if runner.looks_ahead else None
        launch = faults.at("rank.before_step", runner.launch)
        on_device = LaunchAhead(launch, runner.block_size)
        self._launch_ahead = on_device if runner.launches_ahead else None
        self._came: Message | None = None
        """Received while a step was computed ahead."""
        self._report_step = faults.at("rank.after_step", self._send_result)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._cuts = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        """libzmq connects again, and tells nobody that what was on its way is lost."""
        self._poller.register(self._cuts, zmq.POLLIN)
        self._poller.register(self._copies.fileno(), zmq.POLLIN)
        self._send(WorkerReady(rank, runner.device_blocks, runner.host_blocks, runner.block_bytes))

    def run(self) -> bool:
        """Execute steps until told to end.

        Returns:
            Whether this is a normal end; False when another rank was lost.

        Raises:
            CoordinatorLostError: the coordinator has ended or is silent, or was out of reach.
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
            self._send(WorkerFailed(self._rank, describe(error)))
            raise
        finally:
            self._socket.disable_monitor()
            self._cuts.close()
            self._socket.close()

    def _execute(self, command: StepCommand) -> None:
        if self._launch_ahead:
            self._execute_on_device(command, self._launch_ahead)
            return
        output = self._look_ahead.take(command) if self._look_ahead else None
        batch = self._begin(command)
        if not batch:
            return
        if output is None:
            began_at = time.monotonic()
            output = self._compute(batch)
            if self._look_ahead:  # as those that are computed ahead are measured
                output = replace(output, compute_s=time.monotonic() - began_at)
        self._report_step(command.plan.step_id, output)
        if self._look_ahead:
            self._look_ahead.go_on(batch, output, partial(self._look_around, self._look_ahead))

    def _execute_on_device(self, command: StepCommand, launch_ahead: LaunchAhead) -> None:
        """The device has the next step before the host knows the tokens of this one."""
        step = launch_ahead.take(command)
        batch = self._begin(command)
        if not batch:
            return
        step = step or launch_ahead.launch(batch)
        launch_ahead.go_on(batch, step)
        output = step.result()
        self._report_step(command.plan.step_id, output)
        launch_ahead.learn(batch, output)

    def _begin(self, command: StepCommand) -> list[SequenceInput]:
        """Take over a plan, let its copies start, and hold back its step for those before it."""
        plan = command.plan
        batch = self._sequences.apply(command)
        self._copies.start(plan.copies)
        self._copies.wait(
            [copy.copy_id for copy in plan.copies if copy.precedes_step == plan.step_id]
        )
        return batch

    def _look_around(self, look_ahead: LookAhead) -> Verdict:
        """Within a step that is computed ahead: see what has come meanwhile."""
        while self._socket.poll(0):
            message = self._take_message()
            if isinstance(message, KeepAlive):
                continue
            self._came = message
            fits = isinstance(message, StepCommand) and look_ahead.fits(message)
            return Verdict.GO_ON if fits else Verdict.ABANDON
        return Verdict.UNKNOWN

    def _send_result(self, step_id: int, output: StepOutput) -> None:
        # Copies first: the blocks they free can then be given away in the next plan.
        self._report_copies()
        if self._runner.is_sampling_rank:
            copy_wait_s = self._copies.take_wait_s()
            self._send(
                StepResult(
                    step_id,
                    tuple(output.token_ids),
                    copy_wait_s,
                    output.logprobs,
                    output.failures,
                    output.scored,
                    output.embeddings,
                    output.compute_s,
                )
            )

    def _report_copies(self) -> None:
        for copy_id, copy_s in self._copies.finished().items():
            self._send(CopyResult(copy_id, self._rank, copy_s))

    def _receive(self) -> Message:
        if came := self._came:
            self._came = None
            return came
        silent_s = 0.0  # counted in looks: no pause of this process is the coordinator's silence
        while True:
            ready = dict(self._poller.poll(_LOOK_AROUND_MS))
            if self._copies.fileno() in ready:
                self._report_copies()
            if self._socket in ready:
                return self._take_message()
            # If that was its end, it is known by then.
            is_cut = self._cuts in ready and not self._socket.poll(_LOOK_AROUND_MS)
            if (is_cut or not ready) and not self._coordinator_alive():
                raise CoordinatorLostError("the coordinator has ended without a word")
            if is_cut:
                raise CoordinatorLostError("the connection to the coordinator was cut")
            silent_s += _LOOK_AROUND_MS / 1000 if not ready else 0.0
            if silent_s > self._patience_s:
                raise CoordinatorLostError(
                    f"nothing heard from the coordinator for {self._patience_s:g} s "
                    "(parallel.timeout_s)"
                )

    def _take_message(self) -> Message:
        return decode(self._receive_frame())

    def _send(self, message: Message) -> None:
        self._send_frame(encode(message))

    def _put(self, frame: bytes) -> None:
        self._socket.send(frame, zmq.DONTWAIT)
