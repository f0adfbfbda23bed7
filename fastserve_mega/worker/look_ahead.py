"""A rank's next step is computed while the coordinator still plans it. No torch here."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import msgspec

from fastserve_mega.messaging.rank_messages import StepCommand
from fastserve_mega.types import RequestId
from fastserve_mega.worker.model_runner import Ask, Launched, SequenceInput, StepOutput


class _Guess:
    """Who takes part in the next step, each with its new token.

    Only that is guessed. Where the command that comes asks for these sequences, or for some of
    them, the step is done. Where it asks for anything else nothing of it counts: it has written KV
    only at positions behind those that the scheduler takes for computed, in blocks that nobody else
    had when it began, and it ends before the command frees or copies any.

    Where the last guess was wrong, the next step waits for its command: those whose places others
    want take turns, and a step that is abandoned delays what comes instead.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._guess: dict[RequestId, SequenceInput] = {}
        """In the order of the batch."""
        self._was_right = True

    def fits(self, command: StepCommand) -> bool:
        """Whether a command asks for nothing but sequences of the guess."""
        batch = command.plan.batch
        if command.started or not batch:
            return False
        for piece, token_ids in zip(batch, command.token_ids, strict=True):
            guessed = self._guess.get(piece.request_id)
            if guessed is None or (piece.start, token_ids) != (guessed.start, guessed.token_ids):
                return False
        return True

    def _judge(self, command: StepCommand) -> bool:
        """Whether the guess, if there is one, was right; from now on there is none."""
        is_right = self.fits(command)
        if self._guess:
            self._was_right = is_right
        self._guess = {}
        return is_right

    def _following(
        self, batch: Sequence[SequenceInput], tokens: Sequence[int], failed: Collection[int]
    ) -> dict[RequestId, SequenceInput]:
        """The sequences that go on, each with its new token; none when that is not all there is.

        Args:
            batch: of the step before.
            tokens: one for each of them.
            failed: rows without a token.
        """
        if not all(sequence.samples for sequence in batch):
            return {}  # the rest of a prompt comes next
        following = {}
        for row, (sequence, token) in enumerate(zip(batch, tokens, strict=True)):
            start = sequence.context
            if row in failed or start + 1 >= sequence.prompt_tokens + sequence.params.max_tokens:
                continue  # it has ended
            if start >= len(sequence.block_table) * self._block_size:
                return {}  # the plan has to bring a block
            if sequence.history is not None:
                sequence.history.follow(start, (token,))
            following[sequence.request_id] = replace(sequence, token_ids=(token,), start=start)
        return following


class LookAhead(_Guess):
    """Computes, after a step that gave each sequence a token, the step with these tokens.

    Where the command asks for anything else, `fits` says so as soon as it is there, and the step is
    abandoned.

    Args:
        compute: see `ModelRunner.execute_ahead`.
        block_size: tokens of a KV block.
    """

    def __init__(
        self, compute: Callable[[Sequence[SequenceInput], Ask], StepOutput | None], block_size: int
    ) -> None:
        super().__init__(block_size)
        self._compute = compute
        self._output: StepOutput | None = None

    def go_on(self, batch: Sequence[SequenceInput], output: StepOutput, ask: Ask) -> None:
        """Compute what follows a step, unless it cannot be told, or the last guess was wrong.

        Args:
            batch: of the step that is done.
            output: of it.
            ask: says whether the command that has come, if any, `fits`.
        """
        failed = {failure.index for failure in output.failures}
        self._guess = self._following(batch, output.token_ids, failed)
        if not self._guess or not self._was_right:
            return
        began_at = time.monotonic()
        if done := self._compute(list(self._guess.values()), ask):
            self._output = replace(done, compute_s=time.monotonic() - began_at)

    def take(self, command: StepCommand) -> StepOutput | None:
        """What was computed ahead of a command; None when that is not what it asks for.

        Call it before the command changes any block table.
        """
        output, self._output = self._output, None
        guess = self._guess
        if not self._judge(command) or output is None:
            return None
        return _part(output, _wanted(command, guess))


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step that a device was given, or some of its sequences."""

    step: Launched
    rows: Sequence[int]
    """Where in the step the sequences stand that the command asks for."""

    def result(self) -> StepOutput:
        """Wait for what the sequences yield."""
        return _part(self.step(), self.rows)


class LaunchAhead(_Guess):
    """Gives a device the next step before the tokens of the last one have reached the host.

    The device takes them from where it has drawn them. So it has work while tokens and plan
    travel; a step that its command does not ask for is computed to its end.

    Args:
        launch: see `ModelRunner.launch`.
        block_size: tokens of a KV block.
    """

    def __init__(
        self, launch: Callable[[Sequence[SequenceInput]], Launched], block_size: int
    ) -> None:
        super().__init__(block_size)
        self._launch = launch
        self._step: Launched | None = None
        self._order: dict[RequestId, SequenceInput] = {}

    def launch(self, batch: Sequence[SequenceInput]) -> LaunchedStep:
        """Give the device the step that a command asks for."""
        sampled = sum(sequence.samples for sequence in batch)
        return LaunchedStep(self._launch(batch), range(sampled))

    def go_on(self, batch: Sequence[SequenceInput], launched: LaunchedStep) -> None:
        """Give it what follows, unless that cannot be told, or the last guess was wrong.

        Where sampling depends on more than the logits, the host has to know the tokens first.

        Args:
            batch: of the step that is being computed.
            launched: that step.
        """
        self._guess = {}
        if all(sequence.is_plain for sequence in batch):
            tokens = [-1 - row for row in launched.rows]
            self._guess = self._order = self._following(batch, tokens, ())
        if self._guess and self._was_right:
            self._step = self._launch(list(self._guess.values()))

    def learn(self, batch: Sequence[SequenceInput], output: StepOutput) -> None:
        """Take the tokens of the step before the one that is being computed."""
        failed = {failure.index for failure in output.failures}
        self._guess = {
            guessed.request_id: replace(guessed, token_ids=(token,))
            for row, (sequence, token) in enumerate(zip(batch, output.token_ids, strict=False))
            if row not in failed and (guessed := self._guess.get(sequence.request_id))
        }

    def take(self, command: StepCommand) -> LaunchedStep | None:
        """As `LookAhead.take`; the step may still be computed."""
        step, self._step = self._step, None
        if not self._judge(command) or step is None:
            return None
        return LaunchedStep(step, _wanted(command, self._order))


def _wanted(command: StepCommand, guess: Iterable[RequestId]) -> list[int]:
    """The rows of a guess that a command asks for."""
    rows = {request_id: row for row, request_id in enumerate(guess)}
    return [rows[piece.request_id] for piece in command.plan.batch]


def _part(output: StepOutput, rows: Sequence[int]) -> StepOutput:
    """The output of some rows, in their order."""
    if list(rows) == list(range(len(output.token_ids))):
        return output
    failures = {failure.index: failure for failure in output.failures}
    return replace(
        output,
        token_ids=[output.token_ids[row] for row in rows],
        logprobs=tuple(output.logprobs[row] for row in rows) if output.logprobs else (),
        failures=tuple(
            msgspec.structs.replace(failures[row], index=index)
            for index, row in enumerate(rows)
            if row in failures
        ),
    )
