"""Chooses tokens from logits, for the whole batch at once.

The random number of a token depends on the request's seed and the token's position only. A
request that is preempted, moved or resumed, alone or in any batch, therefore goes on with the
random numbers it would have had.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import msgspec
import torch
from torch import Tensor

from fastserve_mega.messaging.rank_messages import SamplingFailure
from fastserve_mega.worker.drawing import draw_at_random, find_largest, uniform
from fastserve_mega.worker.grammar import GrammarError, Grammars
from fastserve_mega.worker.logprobs import ModelDistribution
from fastserve_mega.worker.model_runner import SequenceInput, StepOutput
from fastserve_mega.worker.penalties import (
    add_logit_bias,
    keep_allowed,
    last_of_bad_words,
    penalize,
)
from fastserve_mega.worker.transfer import Returning, to_device

_GREEDY_BELOW = 1e-5
"""Temperatures below are greedy, as in vLLM: they make all but the largest logit impossible."""
RULES = 5
"""Numbers that the token of a row is drawn by."""
_WHAT_FORBIDS = "the structure of the output, min_tokens, allowed_token_ids or bad_words"
_LONGEST_MESSAGE = 300
_BROKEN_DEVICE = ("CUDA error", "HIP error")

Draw = Callable[[Tensor, Tensor], Tensor]
"""Logits [rows, vocabulary] and `rules_of` rows to [rows, 2], the token of each row and its largest
logit, without a wait of the host."""

_log = logging.getLogger(__name__)


class Sampler:
    """Samples by the rules of each request's SamplingParams.

    Args:
        eos_token_ids: end-of-sequence tokens of the model, held back by `min_tokens`.
        grammars: what structured output is held to; None refuses it.
        draw: chooses the tokens of all rows on the device (worker.kernels.sampling); None: torch
            does, and the host waits for it several times.
    """

    def __init__(
        self,
        eos_token_ids: Sequence[int],
        grammars: Grammars | None = None,
        draw: Draw | None = None,
    ) -> None:
        self._eos_token_ids = tuple(eos_token_ids)
        self._grammars = grammars
        self._draw = draw

    def prepare(self, sequences: Sequence[SequenceInput]) -> None:
        """Begin in the background what sampling of these will need; call it before the model."""
        if self._grammars is None:
            return
        for sequence in sequences:
            if sequence.params.structured is not None and sequence.history is not None:
                self._grammars.begin(sequence.params.structured, sequence.history)

    def __call__(
        self, logits: Tensor, sequences: Sequence[SequenceInput], drawn: Tensor | None = None
    ) -> StepOutput:
        """One token or failure for each row of `logits` [sequences, vocabulary].

        A row that cannot be sampled is a failure of its request. The others get the tokens that
        they would have had without it.

        Args:
            logits: of the model.
            sequences: one for each row.
            drawn: what `draw` makes of these logits by the rules of these sequences, if it has
                been run already; used where no sequence changes the logits.
        """
        try:
            if self._draw is not None:
                return self._sample_on_device(self._draw, logits, sequences, drawn)
            return self._sample(logits, sequences)
        except Exception as error:
            if _device_is_broken(error):
                raise
            if len(sequences) == 1:
                _log.warning("sampling %s failed", sequences[0].request_id, exc_info=True)
                return StepOutput([0], (None,), (SamplingFailure(0, _sentence(error)),))
        rows = [self(logits[row : row + 1], [each]) for row, each in enumerate(sequences)]
        return _joined(rows)

    def start(
        self, logits: Tensor, sequences: Sequence[SequenceInput], drawn: Tensor | None = None
    ) -> tuple[Tensor, Callable[[], StepOutput]]:
        """As a call, but the host need not wait: for sequences that are plain, by `draw`.

        Returns:
            What was drawn, and what waits until it has reached the host.
        """
        assert self._draw is not None, "nothing draws on the device"
        if drawn is None:
            drawn = self._draw(logits, to_device(rules_of(sequences), logits.device))
        distribution, returning = ModelDistribution(logits, sequences), Returning(drawn)
        return drawn, lambda: _told(returning.wait(), distribution, {})

    def _sample(self, logits: Tensor, sequences: Sequence[SequenceInput]) -> StepOutput:
        logits = logits.to(torch.float32).contiguous()
        distribution = ModelDistribution(logits, sequences)
        changed, failures = self._changed(logits, sequences)
        tokens, largest_of_model = find_largest(logits)
        largest = largest_of_model
        if changed is not logits:
            tokens, largest = find_largest(changed)
        failures = {**_unusable(list(zip(largest_of_model, largest, strict=True))), **failures}
        _choose_at_random(tokens, changed, sequences, failures)
        failed = tuple(failures[row] for row in sorted(failures))
        return StepOutput(tokens, distribution.of(tokens), failed)

    def _sample_on_device(
        self,
        draw: Draw,
        logits: Tensor,
        sequences: Sequence[SequenceInput],
        drawn: Tensor | None,
    ) -> StepOutput:
        distribution = ModelDistribution(logits, sequences)
        if not any(sequence.changes_logits for sequence in sequences):
            if drawn is None:
                drawn = draw(logits, to_device(rules_of(sequences), logits.device))
            return _told(drawn, distribution, {})
        changed, failures = self._changed(logits.to(torch.float32), sequences)
        drawn = draw(changed, to_device(rules_of(sequences), logits.device))
        before = logits.amax(dim=-1, keepdim=True).double()
        return _told(torch.cat((drawn, before), dim=-1), distribution, failures)

    def _changed(
        self, logits: Tensor, sequences: Sequence[SequenceInput]
    ) -> tuple[Tensor, dict[int, SamplingFailure]]:
        """What requests make of the model's logits, and why rows cannot be sampled.

        A copy where there is something to change: when that fails, each row is tried by itself.
        """
        if not any(sequence.changes_logits for sequence in sequences):
            return logits, {}
        logits = logits.clone()
        failures = self._hold_to_grammars(logits, sequences)
        keep_allowed(logits, sequences)
        self._hold_back(logits, sequences)
        add_logit_bias(logits, sequences)
        penalize(logits, sequences)
        return logits, failures

    def _hold_to_grammars(
        self, logits: Tensor, sequences: Sequence[SequenceInput]
    ) -> dict[int, SamplingFailure]:
        """Make impossible what grammars forbid, in place; returns why for rows that cannot be."""
        failures = {}
        for row, sequence in enumerate(sequences):
            if sequence.params.structured is None or sequence.history is None:
                continue
            try:
                if self._grammars is None:
                    raise GrammarError("this rank has no structured output")
                self._grammars.hold(logits[row], sequence.params.structured, sequence.history)
            except GrammarError as error:
                failures[row] = SamplingFailure(row, str(error), error.is_invalid)
        return failures

    def _hold_back(self, logits: Tensor, sequences: Sequence[SequenceInput]) -> None:
        """Make impossible, in place, what would end an answer too early or complete a bad word."""
        vocabulary = logits.shape[-1]
        held_back = [
            (row, token)
            for row, sequence in enumerate(sequences)
            for token in {*self._ends_too_early(sequence), *last_of_bad_words(sequence)}
            if token < vocabulary
        ]
        if held_back:
            rows, tokens = to_device(torch.tensor(held_back), logits.device).unbind(dim=1)
            logits[rows, tokens] = -torch.inf

    def _ends_too_early(self, sequence: SequenceInput) -> tuple[int, ...]:
        if not sequence.awaits_min_tokens:
            return ()
        return (*self._eos_token_ids, *sequence.params.stop_token_ids)


def rules_of(sequences: Sequence[SequenceInput]) -> Tensor:
    """Temperature (0 is greedy), top_k, top_p, min_p and random number of each row.

    [RULES, rows] in float64.
    """
    params = [sequence.params for sequence in sequences]
    rules = [
        [0.0 if _is_greedy(s) else s.params.temperature for s in sequences],
        [float(max(p.top_k, 0)) for p in params],
        [p.top_p for p in params],
        [p.min_p for p in params],
        [uniform(s.seed, s.context) for s in sequences],
    ]
    return torch.tensor(rules, dtype=torch.float64)


def _told(
    drawn: Tensor,
    distribution: ModelDistribution,
    failures: Mapping[int, SamplingFailure],
) -> StepOutput:
    """What the host waits for, once, and all that it reads back.

    Args:
        drawn: [rows, 2 or 3]: of each row its token, its largest logit, and that of the model
            where the logits were changed.
        distribution: of the model.
        failures: of rows, by their numbers.
    """
    told = drawn.tolist()
    failures = {**_unusable([(numbers[-1], numbers[1]) for numbers in told]), **failures}
    # Of logits that are not finite nothing is a token.
    tokens = [0 if row in failures else int(numbers[0]) for row, numbers in enumerate(told)]
    failed = tuple(failures[row] for row in sorted(failures))
    return StepOutput(tokens, distribution.of(tokens), failed)


def _unusable(largest: Sequence[tuple[float, float]]) -> dict[int, SamplingFailure]:
    """Why rows cannot be sampled, from their largest logits before and after all changes."""
    failures = {}
    for row, (of_model, left) in enumerate(largest):
        if not math.isfinite(of_model):
            why = f"the model's logits are not finite: the largest is {of_model}"
        elif not math.isfinite(left):
            why = f"no token can be sampled: {_WHAT_FORBIDS} forbid all"
        else:
            continue
        failures[row] = SamplingFailure(row, why)
    return failures


def _choose_at_random(
    tokens: list[int],
    logits: Tensor,
    sequences: Sequence[SequenceInput],
    failures: Mapping[int, SamplingFailure],
) -> None:
    """Replace the greedy choice of the rows that are to be sampled, in place."""
    random_rows = [
        row
        for row, sequence in enumerate(sequences)
        if row not in failures and not _is_greedy(sequence)
    ]
    if random_rows:
        chosen = draw_at_random(logits[random_rows], [sequences[row] for row in random_rows])
        for row, token in zip(random_rows, chosen, strict=True):
            tokens[row] = token


def _joined(outputs: Sequence[StepOutput]) -> StepOutput:
    """The outputs of single rows as that of a batch."""
    logprobs = tuple((output.logprobs or (None,))[0] for output in outputs)
    return StepOutput(
        [token for output in outputs for token in output.token_ids],
        logprobs if any(logprobs) else (),
        tuple(
            msgspec.structs.replace(failure, index=row)
            for row, output in enumerate(outputs)
            for failure in output.failures
        ),
    )


def _device_is_broken(error: Exception) -> bool:
    """Whether nothing can be computed here any more: then the rank is lost, and not a request."""
    return any(name in str(error) for name in _BROKEN_DEVICE)


def _sentence(error: Exception) -> str:
    told = f"sampling failed: {type(error).__name__}: {error}"[:_LONGEST_MESSAGE]
    # Lone surrogates could not be sent.
    return " ".join(told.encode(errors="replace").decode().split())


def _is_greedy(sequence: SequenceInput) -> bool:
    params = sequence.params
    return params.temperature < _GREEDY_BELOW or params.top_k == 1 or params.top_p == 0
