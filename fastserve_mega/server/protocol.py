"""Bodies of requests in OpenAI's shape."""

from __future__ import annotations

import re
from abc import abstractmethod
from functools import cached_property
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationInfo, field_validator, model_validator

from fastserve_mega.models.generation_config import NO_DEFAULTS, SamplingDefaults
from fastserve_mega.server.strict import (
    KeptTokens,
    Neutral,
    Strict,
    Texts,
    TokenIds,
    refuse_many_fields,
    short,
)
from fastserve_mega.server.structured import (
    ResponseFormat,
    Schema,
    StructuredOutputs,
    all_forms,
    only_one,
)
from fastserve_mega.system.api_keys import hash_secret
from fastserve_mega.text.detokenizer import stop_strings
from fastserve_mega.types import (
    MAX_ALLOWED_TOKENS,
    MAX_BIASED_TOKENS,
    MAX_STOP_TOKENS,
    MAX_TOP_LOGPROBS,
    SamplingParams,
    StructuredOutput,
    seed_of,
)

_LONGEST_USER = 200
"""Characters of `user` by which a client is known; a longer one is known by its hash."""
MAX_BAD_WORDS = 128
MAX_BAD_WORD_LENGTH = 256
MAX_ANSWERS = 1024
"""Answers of one HTTP request: prompts times n."""
Number = TypeVar("Number", int, float)
UNSUPPORTED: Neutral = {"use_beam_search": (False,), "spaces_between_special_tokens": (True,)}
_UNSUPPORTED_OPTIONS: Neutral = {"include_obfuscation": (False,)}
PROMPT_CACHE: Neutral = {"prompt_cache_options": (), "prompt_cache_retention": ("in_memory",)}
_MOST_TOKENS = {
    "stop_token_ids": MAX_STOP_TOKENS,
    "allowed_token_ids": MAX_ALLOWED_TOKENS,
    "logit_bias": MAX_BIASED_TOKENS,
}
_TOKEN_ID = re.compile("0|[1-9][0-9]{0,18}")


class StreamOptions(Strict):
    """What a stream tells besides text."""

    unsupported = _UNSUPPORTED_OPTIONS
    include_usage: bool = False
    continuous_usage_stats: bool = False
    """vLLM's: with each piece of the stream, not only at its end; needs include_usage."""


class Common(Strict):
    """What all APIs that generate have in common. null stands for the default."""

    model: str | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    # About who asks, not about the answer.
    user: str | None = None
    """Shares the server as one client, where no key says who asks."""
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str | None] | None = None
    # Extensions, named as in vLLM.
    seed: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    priority: int | None = None
    cache_salt: str | None = None
    """KV is shared among requests with the same salt only."""
    expected_output_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    session: str | None = None
    """Requests with the same one share the service they attained."""
    timeout: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Seconds after which the answer ends with finish reason `timeout`."""

    @field_validator("metadata", mode="before")
    @classmethod
    def _little_metadata(cls, metadata: object) -> object:
        refuse_many_fields(metadata)
        return metadata

    @property
    def client(self) -> str:
        """Who asks, as the scheduler is to know it; empty when that is not said."""
        if not self.user:
            return ""
        return f"user:{self.user if len(self.user) <= _LONGEST_USER else hash_secret(self.user)}"

    def common(self) -> dict[str, Any]:
        """These fields of the request, for a request of another API."""
        return {name: getattr(self, name) for name in Common.model_fields}


class GenerationRequest(Common):
    """What completions and chat completions have in common."""

    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1, le=128)
    """Answers to each prompt."""
    max_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    """Token id, as a string, to what is added to its logit."""
    stop: str | Texts | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: TokenIds | None = None
    allowed_token_ids: Annotated[TokenIds, Field(min_length=1)] | None = None
    bad_words: Annotated[Texts, Field(max_length=MAX_BAD_WORDS)] | None = None
    """Texts that the answer does not have, as far as tokens tell."""
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    truncate_prompt_tokens: KeptTokens | None = None
    """So many tokens at the end of the prompt are kept; -1 for as many as leave room."""
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: str | None = None
    guided_choice: Texts | None = None

    @model_validator(mode="after")
    def _stream_for_its_options(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for stream=true only")
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs are told in whole answers only, not with stream=true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return stop_strings(self.stop)

    @property
    def answers_per_prompt(self) -> int:
        return self.n or 1

    @property
    @abstractmethod
    def continues_text(self) -> bool:
        """Whether the answer goes on with the text of the prompt."""

    @property
    @abstractmethod
    def top_logprobs_asked(self) -> int | None:
        """How many of the most probable tokens are told; None tells no log probabilities."""

    @property
    def echoes_logprobs(self) -> bool:
        """Whether each answer begins with the log probabilities of its prompt."""
        return False

    @property
    def only_prompts(self) -> bool:
        return False

    @cached_property
    def structured_output(self) -> StructuredOutput | None:
        """The form that the output is held to: of a call that is forced, else the one asked for.

        Agents ask for both; the second is of the message that ends their conversation.

        Raises:
            ValueError: several are asked for, or one that is too long.
            RecursionError: its schema is nested too deeply.
        """
        asked = (self.response_format, self.structured_outputs)
        guided = (self.guided_json, self.guided_regex, self.guided_choice)
        wanted = None
        if any(each is not None for each in (*asked, *guided)):
            found = [form for each in asked if each and (form := each.structured()) is not None]
            wanted = only_one([*found, *all_forms(*guided)])
        return self._forced_call() or wanted

    def _forced_call(self) -> StructuredOutput | None:
        """The form of the tool call that the answer has to be."""
        return None

    @property
    def usage_in_stream(self) -> Literal["never", "at the end", "always"]:
        """When a stream tells the token counts; `always` is with each piece."""
        options = self.stream_options
        if options is None or not options.include_usage:
            return "never"
        return "always" if options.continuous_usage_stats else "at the end"

    @field_validator("stop", mode="before")
    @classmethod
    def _only_stop_strings(cls, stop: object) -> object:
        stop_strings(stop)
        return stop

    @field_validator(*_MOST_TOKENS, mode="before")
    @classmethod
    def _few_tokens(cls, tokens: object, field: ValidationInfo) -> object:
        # Before each of them is looked at.
        most = _MOST_TOKENS[field.field_name or ""]
        if isinstance(tokens, list | dict) and len(tokens) > most:
            raise ValueError(f"at most {most} tokens, got {len(tokens)}")
        return tokens

    @field_validator("bad_words")
    @classmethod
    def _short_bad_words(cls, words: list[str] | None) -> list[str] | None:
        for word in words or ():
            if not word.strip() or len(word) > MAX_BAD_WORD_LENGTH:
                raise ValueError(
                    f"a word has 1 to {MAX_BAD_WORD_LENGTH} characters and is not only space, "
                    f"got {short(word)}"
                )
        return words

    def sampling_params(
        self, max_tokens: int, number: int = 0, defaults: SamplingDefaults = NO_DEFAULTS
    ) -> SamplingParams:
        """How to sample at most `max_tokens` tokens of answer `number` to a prompt.

        The defaults stand for what the request does not give.

        Raises:
            ValueError: a value is outside its range.
        """
        tops = (self.top_logprobs_asked, self.prompt_logprobs)
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=_given(self.temperature, defaults.temperature),
            top_p=_given(self.top_p, defaults.top_p),
            # vLLM's clients say -1 for all tokens.
            top_k=0 if self.top_k == -1 else _given(self.top_k, defaults.top_k),
            min_p=_given(self.min_p, defaults.min_p),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=_given(self.repetition_penalty, defaults.repetition_penalty),
            logit_bias=_by_token_id(self.logit_bias or {}),
            allowed_token_ids=tuple(self.allowed_token_ids or ()),
            logprobs=max((top for top in tops if top is not None), default=None),
            # All answers have the same prompt.
            prompt_logprobs=self.echoes_logprobs
            or (self.prompt_logprobs is not None and not number),
            structured=self.structured_output,
            # And -1 for a seed to be drawn.
            seed=None if self.seed in (None, -1) else _derived_seed(self.seed, number),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            min_tokens=self.min_tokens or 0,
        )


def _given(value: Number | None, default: Number) -> Number:
    return default if value is None else value


def _by_token_id(bias: dict[str, float]) -> dict[int, float]:
    for token in bias:
        # Two ways to write one id would hide one of them.
        if not _TOKEN_ID.fullmatch(token):
            raise ValueError(f"logit_bias must be for token ids, got {short(token)}")
    return {int(token): value for token, value in bias.items()}


def _derived_seed(seed: int, number: int) -> int:
    """The seed of answer `number`; that of answer 0 is the seed itself."""
    return seed if number == 0 else seed_of(f"{seed} {number}")
