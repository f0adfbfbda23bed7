"""The worker's loop: receive a plan, copy and compute, report. No torch here."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
    SequenceStart,
    Shutdown,
    StepCommand,
    StepResult,
    WorkerFailed,
    WorkerReady,
)
from fastserve_mega.types import RequestId
from fastserve_mega.worker.history import TokenHistory
from fastserve_mega.worker.look_ahead import LookAhead
from fastserve_mega.worker.model_runner import ModelRunner, SequenceInput, StepOutput, Verdict

_LOOK_AROUND_MS = 500
_LAST_WORDS_MS = 1000


class PlanError(Exception):
    """The coordinator's plan does not follow from the plans before it."""


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
        self._came: Message | None = None
        """Received while a step was computed ahead."""
        self._came_at = 0.0
        self._report_step = faults.at("rank.after_step", self._send_result)
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
        ahead = self._look_ahead.take(command, self._came_at) if self._look_ahead else None
        batch = self._sequences.apply(command)
        self._copies.start(plan.copies)
        self._copies.wait(
            [copy.copy_id for copy in plan.copies if copy.precedes_step == plan.step_id]
        )
        if not batch:
            return
        output = ahead.output if ahead else self._compute(batch)
        self._report_step(plan.step_id, output, ahead.ahead_s if ahead else 0.0)
        if self._look_ahead:
            self._look_ahead.go_on(batch, output, partial(self._look_around, self._look_ahead))

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

    def _send_result(self, step_id: int, output: StepOutput, ahead_s: float) -> None:
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
                    ahead_s,
                )
            )

    def _report_copies(self) -> None:
        for copy_id, copy_s in self._copies.finished().items():
            self._send(CopyResult(copy_id, self._rank, copy_s))

    def _receive(self) -> Message:
        if came := self._came:
            self._came = None
            return came
        give_up_at = time.monotonic() + self._patience_s
        while True:
            ready = dict(self._poller.poll(_LOOK_AROUND_MS))
            if self._copies.fileno() in ready:
                self._report_copies()
            if self._socket in ready:
                return self._take_message()
            if not ready and not self._coordinator_alive():
                raise CoordinatorLostError("the coordinator has ended without a word")
            if time.monotonic() > give_up_at:
                raise CoordinatorLostError(
                    f"nothing heard from the coordinator for {self._patience_s:g} s "
                    "(parallel.timeout_s)"
                )

    def _take_message(self) -> Message:
        message = decode(self._receive_frame())
        self._came_at = time.monotonic()
        return message

    def _send(self, message: Message) -> None:
        self._send_frame(encode(message))

    def _put(self, frame: bytes) -> None:
        self._socket.send(frame, zmq.DONTWAIT)


@dataclass(slots=True)
class _Sequence:
    """What a rank remembers of a request between steps, besides its KV."""

    start: SequenceStart
    history: TokenHistory | None
    block_table: array[int] = field(default_factory=lambda: array("q"))
    """Compact: a step copies the tables of all its sequences."""


class SequenceTable:
    """Follows the plans, and turns each into complete inputs for the runner.

    Args:
        samples: this is the rank that samples; the others need no history.
    """

    def __init__(self, *, samples: bool = True) -> None:
        self._samples = samples
        self._sequences: dict[RequestId, _Sequence] = {}
        self._announced: list[SequenceStart] = []
        self._next_step_id: int | None = None

    def __len__(self) -> int:
        return len(self._sequences)

    def announce(self, started: Sequence[SequenceStart]) -> None:
        """Take over new sequences of the next plan, which does not name them again."""
        self._announced += started

    def apply(self, command: StepCommand) -> list[SequenceInput]:
        """Take over releases, new sequences and new blocks; return the step's batch.

        Raises:
            PlanError: a gap in the step ids, or a slice of an unknown request.
        """
        plan = command.plan
        if self._next_step_id is not None and plan.step_id != self._next_step_id:
            raise PlanError(f"step {plan.step_id} came, step {self._next_step_id} was expected")
        self._next_step_id = plan.step_id + 1
        for request_id in plan.released:
            self._sequences.pop(request_id, None)
        started, self._announced = [*self._announced, *command.started], []
        for start in started:
            self._sequences[start.request_id] = _Sequence(start, self._history(start))
        batch = []
        for piece, token_ids in zip(plan.batch, command.token_ids, strict=True):
            if (sequence := self._sequences.get(piece.request_id)) is None:
                raise PlanError(f"step {plan.step_id} has a slice of unknown {piece.request_id}")
            if piece.block_ids:
                sequence.block_table[piece.block_start :] = array("q", piece.block_ids)
            if sequence.history is not None:
                sequence.history.follow(piece.start, token_ids)
            batch.append(
                SequenceInput(
                    request_id=piece.request_id,
                    token_ids=token_ids,
                    start=piece.start,
                    block_table=sequence.block_table,
                    samples=piece.samples,
                    params=sequence.start.params,
                    seed=sequence.start.seed,
                    prompt_tokens=sequence.start.num_prompt_tokens,
                    history=sequence.history,
                )
            )
        return batch

    def _history(self, start: SequenceStart) -> TokenHistory | None:
        if not (self._samples and start.params.needs_history):
            return None
        return TokenHistory(start.num_prompt_tokens, start.prompt, start.output)
