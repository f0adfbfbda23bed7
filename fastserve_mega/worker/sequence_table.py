"""What a rank knows of its requests between steps. No torch here."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastserve_mega.messaging.rank_messages import SequenceStart, StepCommand
from fastserve_mega.types import RequestId
from fastserve_mega.worker.history import TokenHistory
from fastserve_mega.worker.model_runner import SequenceInput


class PlanError(Exception):
    """The coordinator's plan does not follow from the plans before it."""


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
