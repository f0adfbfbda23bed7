"""The vocabulary every other module shares."""

from __future__ import annotations

import math
from enum import StrEnum
from hashlib import blake2b
from typing import NewType

import msgspec

from fastserve_mega.records import Count, OpenRecord, Record

RequestId = NewType("RequestId", str)
"""Chosen by the client, unique among its unfinished requests; resubmitting it is idempotent."""

BlockHash = NewType("BlockHash", str)
"""Names the content of a full KV block: its tokens, all tokens before them, and a salt."""

BACKGROUND_PRIORITY = 1000
"""The lowest there is: of work that nobody waits for. All other work goes before it."""
MIN_SEED = -(2**63)
MAX_SEED = 2**63 - 1
MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 100.0
MAX_BIASED_TOKENS = 1024
MAX_STOP_TOKENS = 1024
MAX_ALLOWED_TOKENS = 1024
MAX_BAD_SEQUENCES = 1024
MAX_BAD_SEQUENCE_LENGTH = 64
MAX_CHOICES = 4096
MAX_STRUCTURE_LENGTH = 65_536
_MAX_PENALTY = 2.0
_MAX_REPETITION_PENALTY = 100.0


def seed_of(text: str) -> int:
    """A seed that is the same for the same text, in whatever process."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) & MAX_SEED


class FinishReason(StrEnum):
    """Why a request ended. Every request ends with exactly one of these."""

    STOP = "stop"
    """End-of-sequence token, stop token, or (at the client) a stop string."""
    LENGTH = "length"
    """`max_tokens` tokens were generated."""
    ABORT = "abort"
    """Cancelled by its client, or the client went away."""
    TIMEOUT = "timeout"
    """The request's own `timeout_s` ran out."""
    ERROR = "error"
    """The server failed; nothing was wrong with the request."""
    REJECTED = "rejected"
    """Not accepted because the server is full; try again later."""


class StructuredOutput(Record, frozen=True, kw_only=True):
    """A form that the output is held to; exactly one of the fields says which.

    Raises:
        ValueError: none or several are given, or they are too long. Whether a schema or an
            expression is valid is found out by `fastserve_mega.text.structured`.
    """

    json_schema: str | None = None
    """A JSON schema, as JSON text."""
    regex: str | None = None
    """A regular expression in Rust's syntax, for the whole output."""
    choice: tuple[str, ...] | None = None
    """Texts of which the output is one."""
    after: int | None = None
    """The form begins behind the first token with this id; until then the output is free, but does
    not end. None: it is held to the form from its first token on."""

    def __post_init__(self) -> None:
        given = [text for text in (self.json_schema, self.regex, self.choice) if text is not None]
        if len(given) != 1:
            raise ValueError(
                "structured output takes one of json_schema, regex and choice, "
                f"got {len(given)} of them"
            )
        if self.choice is not None and len(self.choice) > MAX_CHOICES:
            raise ValueError(
                f"choice must have at most {MAX_CHOICES} texts, got {len(self.choice)}"
            )
        length = sum(map(len, given[0]))
        if not 1 <= length <= MAX_STRUCTURE_LENGTH:
            raise ValueError(
                f"a schema, expression or choice must have 1 to {MAX_STRUCTURE_LENGTH} "
                f"characters, got {length}"
            )


class SamplingParams(Record, frozen=True, kw_only=True):
    """How tokens are chosen and when to end, as token-level rules.

    Stop *strings* are a matter of text and are handled where text is (`fastserve_mega.text`).
    Sampling is counter-based: the random number of a token depends on (seed, position) only.

    Raises:
        ValueError: a value is outside its range; the message names value and limit.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    """0 is greedy, and so is what is below 1e-5."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all tokens."""
    seed: int | None = None
    """None lets the client (or, for a foreign client, the coordinator) choose one."""
    stop_token_ids: tuple[int, ...] = ()
    """At most 1024."""
    ignore_eos: bool = False
    min_tokens: int = 0
    """End-of-sequence and stop tokens are not sampled before this many output tokens."""
    min_p: float = 0.0
    """Tokens less probable than this share of the most probable one's are dropped."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens that the output has."""
    frequency_penalty: float = 0.0
    """Taken off the logits of tokens as often as the output has them."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens that prompt or output have, multiplies the others."""
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict)
    """Token id to what is added to its logit, -100 to 100."""
    allowed_token_ids: tuple[int, ...] = ()
    """No other tokens are sampled, the end of sequence neither; empty: all are. At most 1024."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens that the output never completes: their last token is not sampled behind
    the others. At most 1024, of 1 to 64 tokens each."""
    logprobs: int | None = None
    """Report the log probability of each output token, and of so many of the most probable
    tokens. They are the model's own: before bias, penalties and temperature."""
    prompt_logprobs: bool = False
    """Report them of each prompt token but the first as well; needs `logprobs`. No KV is shared."""
    structured: StructuredOutput | None = None
    """Hold the output to a form; the end of sequence then comes where the form allows it."""
    embeds: bool = False
    """Hand out the prompt's embedding with the one token, so `max_tokens` must be 1: the hidden
    state of the prompt's last token behind the final norm, scaled to length 1."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.prompt_logprobs and self.logprobs is None:
            raise ValueError("prompt_logprobs needs logprobs")
        if self.embeds and self.max_tokens != 1:
            raise ValueError(f"max_tokens must be 1 for an embedding, got {self.max_tokens}")
        self._check_filters()
        self._check_penalties()
        self._check_logit_bias()
        self._check_choice_of_tokens()
        self._check_ends()
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_TOP_LOGPROBS:
            raise ValueError(
                f"logprobs must be between 0 and {MAX_TOP_LOGPROBS}, got {self.logprobs}"
            )

    @property
    def counts_tokens(self) -> bool:
        """Whether the tokens so far change what is sampled next."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )

    @property
    def needs_history(self) -> bool:
        """Whether the rank that samples must know the tokens so far."""
        return (
            self.counts_tokens
            or self.structured is not None
            or self.prompt_logprobs
            or any(len(sequence) > 1 for sequence in self.bad_words)
        )

    def _check_filters(self) -> None:
        _check_range("temperature", self.temperature, 0, 100)
        _check_range("min_p", self.min_p, 0, 1)
        _check_range("top_p", self.top_p, 0, 1)
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all tokens) or positive, got {self.top_k}")
        if self.seed is not None and not MIN_SEED <= self.seed <= MAX_SEED:
            raise ValueError(f"seed must be between {MIN_SEED} and {MAX_SEED}, got {self.seed}")

    def _check_penalties(self) -> None:
        _check_range("presence_penalty", self.presence_penalty, -_MAX_PENALTY, _MAX_PENALTY)
        _check_range("frequency_penalty", self.frequency_penalty, -_MAX_PENALTY, _MAX_PENALTY)
        factor = self.repetition_penalty
        if not (math.isfinite(factor) and 0.0 < factor <= _MAX_REPETITION_PENALTY):
            raise ValueError(
                f"repetition_penalty must be above 0 and at most {_MAX_REPETITION_PENALTY:g}, "
                f"got {factor}"
            )

    def _check_logit_bias(self) -> None:
        if len(self.logit_bias) > MAX_BIASED_TOKENS:
            raise ValueError(
                f"logit_bias must name at most {MAX_BIASED_TOKENS} tokens, "
                f"got {len(self.logit_bias)}"
            )
        for token, bias in self.logit_bias.items():
            if token < 0:
                raise ValueError(f"logit_bias token ids must not be negative, got {token}")
            _check_range(f"logit_bias of token {token}", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)

    def _check_choice_of_tokens(self) -> None:
        for name, tokens, most in (
            ("allowed_token_ids", self.allowed_token_ids, MAX_ALLOWED_TOKENS),
            ("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKENS),
        ):
            if len(tokens) > most:
                raise ValueError(f"{name} must name at most {most} tokens, got {len(tokens)}")
            if (least := min(tokens, default=0)) < 0:
                raise ValueError(f"{name} must not be negative, got {least}")
        if len(self.bad_words) > MAX_BAD_SEQUENCES:
            raise ValueError(
                f"bad_words must be at most {MAX_BAD_SEQUENCES} sequences of tokens, "
                f"got {len(self.bad_words)}"
            )
        for sequence in self.bad_words:
            if not 1 <= len(sequence) <= MAX_BAD_SEQUENCE_LENGTH:
                raise ValueError(
                    f"a sequence of bad_words has 1 to {MAX_BAD_SEQUENCE_LENGTH} tokens, "
                    f"got {len(sequence)}"
                )
            if min(sequence) < 0:
                raise ValueError(f"bad_words must not be negative, got {min(sequence)}")

    def _check_ends(self) -> None:
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(
                f"min_tokens must be between 0 and max_tokens ({self.max_tokens}), "
                f"got {self.min_tokens}"
            )
        if self.structured is not None and (self.ignore_eos or self.min_tokens):
            raise ValueError(
                "structured output ends where its form does; ignore_eos and min_tokens cannot be "
                "combined with it"
            )


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{name} must be between {low:g} and {high:g}, got {value}")


class TokenLogprobs(OpenRecord, frozen=True):
    """How probable the model itself found a token, and which ones it found most probable."""

    logprob: float
    """Natural logarithm of the sampled token's probability."""
    top_ids: tuple[int, ...] = ()
    """The most probable tokens, most probable first; as many as were asked for."""
    top_logprobs: tuple[float, ...] = ()
    """Their logarithms, in the same order."""


class Usage(OpenRecord, frozen=True):
    """Token counts of one finished request."""

    prompt_tokens: Count
    completion_tokens: Count
    cached_tokens: Count = 0
    """Prompt tokens whose KV existed when the request first ran."""


class Interruption(OpenRecord, frozen=True):
    """A time in which a request was preempted: it had no device memory, and others did."""

    at_s: float
    """Seconds from its arrival, and so below."""
    until_s: float
    """When a step took it again."""
    swapped: bool
    """Its KV waited in host memory; else it was dropped and computed again."""


class Timings(OpenRecord, frozen=True):
    """When things happened to a request, in seconds from its arrival at the coordinator.

    Of the coordinator that ended it: one that was started in between knows of nothing before.
    """

    ended_s: float
    started_s: float | None = None
    """When its first step was dispatched: before it was queued, and then its prefill began."""
    first_token_s: float | None = None
    interruptions: tuple[Interruption, ...] = ()
    """In order; the first few dozens."""
