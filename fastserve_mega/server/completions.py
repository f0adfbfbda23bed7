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
from fastserve_mega.server.logprobs import CompletionLogprobs
from fastserve_mega.server.openapi import answers_with
from fastserve_mega.server.protocol import MAX_ANSWERS, UNSUPPORTED, GenerationRequest
from fastserve_mega.server.schemas import Completion
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
    def scores_prompt(self) -> bool:
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
    prompt_logprobs: Callable[[], Json | None]
    """Tells those of the prompt, where they are asked for; to be called first."""

    def whole(self, chunk: Chunk, reason: str) -> Json:
        of_prompt = self.prompt_logprobs()
        told = _joined(of_prompt, self.logprobs(chunk))
        return self._piece(self.echo + chunk.text, told, reason)

    def opening(self) -> list[Json]:
        return [self._piece(self.echo, self.prompt_logprobs())] if self.echo else []

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


def _echo(prompt: str | Sequence[int], decoder: TokenDecoder) -> str:
    return prompt if isinstance(prompt, str) else decoder.decode(prompt)


async def encode_prompts(
    service: Service, body: CompletionRequest
) -> list[tuple[Sequence[int], int]]:
    """Token ids and max_tokens of each prompt.

    Raises:
        ApiError: there is none, or too many, or one that does not fit.
    """
    if not body.prompts:
        raise ApiError(400, "the prompt is empty", param="prompt")
    service.check_answers(len(body.prompts), body.answers_per_prompt)
    prompts: list[tuple[Sequence[int], int]] = []
    async for _, prompt in one_by_one(body.prompts):
        tokens = await _encode(service, body, prompt)
        prompts.append((tokens, await _max_tokens(service, body, tokens)))
    return prompts


async def _encode(
    service: Service, body: CompletionRequest, prompt: str | Sequence[int]
) -> Sequence[int]:
    if not isinstance(prompt, str):
        return prompt
    return await service.encode(prompt, add_special_tokens=body.add_special_tokens is not False)


async def _max_tokens(service: Service, body: CompletionRequest, prompt: Sequence[int]) -> int:
    """How many tokens are generated; one more than asked for when that is none."""
    asked = 1 if body.only_prompts else body.max_tokens
    most = await service.max_tokens_of(prompt, asked)
    return min(most, DEFAULT_MAX_TOKENS) if body.max_tokens is None else most


def completions_router(service: Service) -> APIRouter:
    """The endpoint, with its service."""
    router = APIRouter()

    @router.post("/v1/completions", responses=answers_with(Completion))
    async def create_completion(http: Request, body: CompletionRequest) -> Response:
        prompts = await encode_prompts(service, body)
        decoder = service.decoder_of(body)
        echoes = [
            _echo(prompt, decoder) if body.echo else ""
            async for _, prompt in one_by_one(body.prompts)
        ]
        ends = await service.end_token_ids(body)
        await service.check_model(body.model)

        def choice(index: int) -> CompletionChoice:
            logprobs = CompletionLogprobs(service.tokenizer.token_bytes, decoder, ends)
            number = index // body.answers_per_prompt

            def of_prompt() -> Json | None:
                generation = answer.generations[index]
                return logprobs.of_prompt(prompts[number][0], generation.prompt_logprobs)

            return CompletionChoice(index, echoes[number], logprobs, of_prompt)

        answer = await service.begin(
            http, body, prompts, answer_id=ENDPOINT.new_id(), decoder=decoder
        )
        return await respond(http, answer, ChoicesShape(answer, ENDPOINT, choice))

    return router
