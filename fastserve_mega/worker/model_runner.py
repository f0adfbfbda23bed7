"""The seam between the worker loop and whatever computes tokens: complete inputs. No torch here."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

from fastserve_mega.messaging.rank_messages import (
    SamplingFailure,
    ScoredPrompt,
    SequenceStart,
    StepCommand,
)
from fastserve_mega.types import RequestId, SamplingParams, TokenLogprobs
from fastserve_mega.worker.copy_engine import CopyEngine
from fastserve_mega.worker.history import TokenHistory


@dataclass(frozen=True, slots=True)
class SequenceInput:
    """One request's share of a step, complete: the runner keeps no state per request but KV."""

    request_id: RequestId
    token_ids: Sequence[int]
    """Input tokens, at positions [start, start + len(token_ids)). In a step that is launched behind
    another one, -1 - n is the token that the other one gave its row n."""
    start: int
    """Tokens whose KV is in the block table already."""
    block_table: Sequence[int]
    """Device blocks that hold positions [0, start + len(token_ids)), block_size each."""
    samples: bool
    """Whether the last token's logits are sampled."""
    params: SamplingParams
    seed: int
    prompt_tokens: int
    """Length of the prompt; the token sampled now is output number
    start + len(token_ids) - prompt_tokens."""
    history: TokenHistory | None = None
    """The output so far, where `params` make sampling depend on it."""

    @property
    def context(self) -> int:
        """Tokens in the KV cache once this step has run."""
        return self.start + len(self.token_ids)

    @property
    def embeds(self) -> bool:
        """Whether the step yields the embedding of its prompt."""
        return self.samples and self.params.embeds

    @property
    def scored(self) -> int:
        """How many of its tokens precede a prompt token whose probability is asked for.

        They are the first ones.
        """
        if not self.params.prompt_logprobs:
            return 0
        return max(min(self.context, self.prompt_tokens - 1) - self.start, 0)

    @property
    def awaits_min_tokens(self) -> bool:
        """Whether it is too early to end."""
        return self.context - self.prompt_tokens < self.params.min_tokens

    @property
    def changes_logits(self) -> bool:
        """Whether it is sampled from other logits than the model's."""
        params = self.params
        held = self.history is not None and params.needs_history
        chosen = params.logit_bias or params.allowed_token_ids or params.bad_words
        return held or bool(chosen) or self.awaits_min_tokens

    @property
    def is_plain(self) -> bool:
        """Whether a step yields only a token for it, by what is known before the step."""
        wants_more = self.params.logprobs is not None or self.embeds or self.scored
        return self.samples and not (wants_more or self.history or self.changes_logits)


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step yields on the sampling rank; empty on the others."""

    token_ids: list[int] = field(default_factory=list)
    """One token for each sequence with `samples`, in order."""
    logprobs: tuple[TokenLogprobs | None, ...] = ()
    """One for each token when any sequence asks for them, else empty."""
    failures: tuple[SamplingFailure, ...] = ()
    """Sequences that got no token."""
    scored: tuple[ScoredPrompt, ...] = ()
    """What the sequences are told that ask for the probabilities of their prompts."""
    embeddings: tuple[bytes, ...] = ()
    """One for each sequence with `embeds`, in order, as in `Tokens`."""
    compute_s: float = 0.0
    """What the step took, where that is not the time for which it was waited."""


class Verdict(IntEnum):
    """What becomes of a step that is computed ahead of its command; see `LookAhead`."""

    UNKNOWN = 0
    """Nothing has come yet: ask again."""
    GO_ON = 1
    ABANDON = 2


Ask = Callable[[], Verdict]


Launched = Callable[[], StepOutput]
"""Waits for what a step yields that the device has been given; called once, or never."""


class ModelRunner(Protocol):
    """Executes batches on one rank. All ranks execute the same batches in the same order."""

    @property
    def device_blocks(self) -> int:
        """Blocks of this rank's pool, the null block included."""

    @property
    def host_blocks(self) -> int:
        """Blocks of this rank's pool in host memory; 0 when there is none."""

    @property
    def block_bytes(self) -> int:
        """Memory of this rank's share of a block."""

    @property
    def block_size(self) -> int:
        """Tokens of a block."""

    @property
    def copies(self) -> CopyEngine:
        """What moves blocks between the two pools, beside `execute`."""

    @property
    def is_sampling_rank(self) -> bool:
        """True on the one rank whose `execute` yields tokens."""

    def execute(self, batch: Sequence[SequenceInput]) -> StepOutput:
        """Run one step, on what `copies.wait` was called for before."""

    @property
    def looks_ahead(self) -> bool:
        """Whether it can `execute_ahead`: it is the only rank of its replica."""

    def execute_ahead(self, batch: Sequence[SequenceInput], ask: Ask) -> StepOutput | None:
        """Run a step whose command may not come, and which `ask` may end halfway: then None.

        All it leaves behind is KV at the positions of its tokens.
        """

    @property
    def launches_ahead(self) -> bool:
        """Whether it can `launch`: it is the only rank of its replica, on a device with a queue."""

    def launch(self, batch: Sequence[SequenceInput]) -> Launched:
        """Give the device a step, and wait for nothing of it.

        Where tokens are those of the step launched before (`SequenceInput.token_ids`), all are.
        """

    def close(self) -> None:
        """End the copies, release process groups and memory."""


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
