"""A rank's next step is computed while the coordinator still plans it. No torch here."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from fastserve_mega.messaging.rank_messages import StepCommand
from fastserve_mega.types import RequestId
from fastserve_mega.worker.model_runner import Ask, SequenceInput, StepOutput


@dataclass(frozen=True, slots=True)
class AheadOutput:
    """What a step yields that was computed ahead of its command."""

    output: StepOutput
    ahead_s: float
    """How long it had been computed when the command came."""


class LookAhead:
    """Computes, after a step that gave each sequence a token, the step with these tokens.

    Only who takes part is guessed. Where the command that comes asks for these sequences, or for
    some of them, the step is done. Where it asks for anything else, `fits` says so as soon as it
    is there, the step is abandoned, and nothing of it counts: it has written KV only at positions
    behind those that the scheduler takes for computed, in blocks that nobody else had when it
    began, and it ends before the command frees or copies any.

    Where the last guess was wrong, the next step waits for its command: those whose places others
    want take turns, and a step that is abandoned delays what comes instead.

    Args:
        compute: see `ModelRunner.execute_ahead`.
        block_size: tokens of a KV block.
    """

    def __init__(
        self, compute: Callable[[Sequence[SequenceInput], Ask], StepOutput | None], block_size: int
    ) -> None:
        self._block_size = block_size
        self._compute = compute
        self._guess: Mapping[RequestId, SequenceInput] = {}
        """In the order of the batch."""
        self._output: StepOutput | None = None
        self._was_right = True
        self._began_at = self._ended_at = 0.0

    def go_on(self, batch: Sequence[SequenceInput], output: StepOutput, ask: Ask) -> None:
        """Compute what follows a step, unless it cannot be told, or the last guess was wrong.

        Args:
            batch: of the step that is done.
            output: of it.
            ask: says whether the command that has come, if any, `fits`.
        """
        self._guess = self._following(batch, output)
        if not self._guess or not self._was_right:
            return
        self._began_at = time.monotonic()
        self._output = self._compute(list(self._guess.values()), ask)
        self._ended_at = time.monotonic()

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

    def take(self, command: StepCommand, came_at: float) -> AheadOutput | None:
        """What was computed ahead of a command; None when that is not what it asks for.

        Call it before the command changes any block table.

        Args:
            command: the one that follows.
            came_at: by `time.monotonic`.
        """
        output, self._output = self._output, None
        if self._guess:
            self._was_right = self.fits(command)
        guess, self._guess = self._guess, {}
        if output is None or not self._was_right:
            return None
        ahead_s = min(came_at, self._ended_at) - self._began_at
        rows = {request_id: row for row, request_id in enumerate(guess)}
        wanted = [rows[piece.request_id] for piece in command.plan.batch]
        return AheadOutput(_part(output, wanted), ahead_s)

    def _following(
        self, batch: Sequence[SequenceInput], output: StepOutput
    ) -> dict[RequestId, SequenceInput]:
        """The sequences that go on, each with its new token; none when that is not all there is."""
        if not all(sequence.samples for sequence in batch):
            return {}  # the rest of a prompt comes next
        failed = {failure.index for failure in output.failures}
        following = {}
        for row, (sequence, token) in enumerate(zip(batch, output.token_ids, strict=True)):
            start = sequence.context
            if row in failed or start + 1 >= sequence.prompt_tokens + sequence.params.max_tokens:
                continue  # it has ended
            if start >= len(sequence.block_table) * self._block_size:
                return {}  # the plan has to bring a block
            if sequence.history is not None:
                sequence.history.follow(start, (token,))
            following[sequence.request_id] = replace(sequence, token_ids=(token,), start=start)
        return following


def _part(output: StepOutput, rows: Sequence[int]) -> StepOutput:
    """The output of some rows, in their order."""
    if rows == list(range(len(output.token_ids))):
        return output
    failures = {failure.index: failure for failure in output.failures}
    return StepOutput(
        [output.token_ids[row] for row in rows],
        tuple(output.logprobs[row] for row in rows) if output.logprobs else (),
        tuple(
            msgspec.structs.replace(failures[row], index=index)
            for index, row in enumerate(rows)
            if row in failures
        ),
    )
