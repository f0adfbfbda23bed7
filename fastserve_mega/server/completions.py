"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import Field, field_validator, model_validator

from fastserve_mega.client import Chunk
from fastserve_mega.server.answers import Json, respond
from fastserve_mega.server.choices import ChoicesShape, Endpoint
from fastserve_mega.server.errors import ApiError
from fastserve_mega.server.logprobs import CompletionLogprobs, prompt_logprobs
from fastserve_mega.server.openapi import Completion, answers_with
from fastserve_mega.server.protocol import MAX_ANSWERS, UNSUPPORTED, GenerationRequest
from fastserve_mega.server.service import Service, one_by_one
from fastserve_mega.server.strict import Texts, TokenIds
from fastserve_mega.text.detokenizer import TokenDecoder
from fastserve_mega.types import MAX_TOP_LOGPROBS

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default for this endpoint."""
ENDPOINT = Endpoint("cmpl", "text_completion", "text_completion")


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    unsupported = UNSUPPORTED | {"suffix": ("",)}
    prompt: str | Texts | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)]
    """Text or token ids, or several of one kind."""
    echo: bool | None = None
    """Begin each answer with its prompt."""
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    best_of: int | None = None
    add_special_tokens: bool | None = None
    """To a prompt that is text, as the tokenizer does by default."""

    @field_validator("prompt", mode="before")
    @classmethod
    def _few_prompts(cls, prompt: object) -> object:
        # Before each of them is looked at; of one prompt it is said elsewhere how long it may be.
        if isinstance(prompt, list) and len(prompt) > MAX_ANSWERS and type(prompt[0]) is not int:
            raise ValueError(f"a request has at most {MAX_ANSWERS} prompts, got {len(prompt)}")
        return prompt

    @model_validator(mode="after")
    def _possible(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens must be at least 1, got 0; 0 is for echo=true")
        if self.best_of not in (None, self.answers_per_prompt):
            raise ValueError(
                f"best_of={self.best_of} is not supported unless it is n "
                f"({self.answers_per_prompt})"
            )
        return self

    @property
    def continues_text(self) -> bool:
        return True

    @property
    def top_logprobs_asked(self) -> int | None:
        return self.logprobs

    @property
    def echoes_logprobs(self) -> bool:
        return bool(self.echo) and self.logprobs is not None

    @property
    def only_prompts(self) -> bool:
        """Whether no token is asked for."""
        return self.max_tokens == 0

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, also when there is one only."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [item for item in self.prompt if isinstance(item, int)]
        return [ids] if ids else [item for item in self.prompt if not isinstance(item, int)]


@dataclass(frozen=True, slots=True)
class CompletionChoice:
    """How OpenAI writes completions."""

    index: int
    echo: str
    """The prompt's text, where the answer is to begin with it."""
    logprobs: Callable[[Chunk], Json | None]
    echoed_logprobs: Callable[[], Json | None]
    """Tells those of the prompt, where they are echoed; to be called first."""
    more: Callable[[], Json]
    """Further fields of a whole answer."""

    def whole(self, chunk: Chunk, reason: str) -> Json:
        of_prompt = self.echoed_logprobs()
        told = _joined(of_prompt, self.logprobs(chunk))
        return {**self._piece(self.echo + chunk.text, told, reason), **self.more()}

    def opening(self) -> list[Json]:
        told = self.echoed_logprobs()
        return [self._piece(self.echo, told)] if self.echo or told else []

    def delta(self, chunk: Chunk) -> list[Json]:
        return [self._piece(chunk.text, self.logprobs(chunk))]

    def closing(self, reason: str) -> list[Json]:
        return [self._piece("", None, reason)]

    def _piece(self, text: str, logprobs: Json | None = None, reason: str | None = None) -> Json:
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _joined(first: Json | None, second: Json | None) -> Json | None:
    if first is None or second is None:
        return first or second
    return {name: first[name] + second[name] for name in first}


def _echo(body: CompletionRequest, number: int, ids: Sequence[int], decoder: TokenDecoder) -> str:
    """What an answer to the prompt of a number begins with."""
    if not body.echo:
        return ""
    prompt = body.prompts[number]
    if isinstance(prompt, str) and body.truncate_prompt_tokens is None:
        return prompt
    return decoder.decode(ids)


async def encode_prompts(
    service: Service, body: CompletionRequest
) -> list[tuple[Sequence[int], int]]:
    """Token ids and max_tokens of each prompt.

    Raises:
        ApiError: there is none, or too many, or one that does not fit.
    """
    if not body.prompts:
        raise ApiError(400, "the prompt is empty", param="prompt")
    if len(body.prompts) * body.answers_per_prompt > MAX_ANSWERS:
        raise ApiError(
            400,
            f"a request gets at most {MAX_ANSWERS} answers, "
            f"got {len(body.prompts)} prompts with n={body.answers_per_prompt}",
            param="n",
        )
    prompts: list[tuple[Sequence[int], int]] = []
    async for _, prompt in one_by_one(body.prompts):
        tokens = await _encode(service, body, prompt)
        # One more token than asked for, when that is none.
        asked = 1 if body.only_prompts else body.max_tokens
        tokens, most = await service.fit(body, tokens, asked)
        prompts.append((tokens, min(most, DEFAULT_MAX_TOKENS) if asked is None else most))
    return prompts


async def _encode(
    service: Service, body: CompletionRequest, prompt: str | Sequence[int]
) -> Sequence[int]:
    if not isinstance(prompt, str):
        return prompt
    return await service.encode(prompt, add_special_tokens=body.add_special_tokens is not False)


def completions_router(service: Service) -> APIRouter:
    """The endpoint, with its service."""
    router = APIRouter()

    @router.post("/v1/completions", responses=answers_with(Completion))
    async def create_completion(http: Request, body: CompletionRequest) -> Response:
        prompts = await encode_prompts(service, body)
        decoder = service.decoder_of(body)
        echoes = [
            _echo(body, number, ids, decoder) async for number, (ids, _) in one_by_one(prompts)
        ]
        ends = await service.end_token_ids(body)
        await service.check_model(body.model)

        def choice(index: int) -> CompletionChoice:
            token_bytes, top = service.tokenizer.token_bytes, body.logprobs
            logprobs = CompletionLogprobs(token_bytes, decoder, ends, top)
            number = index // body.answers_per_prompt

            def echoed() -> Json | None:
                told = answer.generations[index]
                if not body.echoes_logprobs:
                    return None
                return logprobs.of_prompt(
                    told.prompt_token_ids, told.prompt_logprobs, echoes[number]
                )

            def more() -> Json:
                first = answer.generations[number * body.answers_per_prompt]
                return prompt_logprobs(first, token_bytes, body.prompt_logprobs)

            return CompletionChoice(index, echoes[number], logprobs, echoed, more)

        answer = await service.begin(
            http, body, prompts, answer_id=ENDPOINT.new_id(), decoder=decoder
        )
        return await respond(http, answer, ChoicesShape(answer, ENDPOINT, choice))

    return router
