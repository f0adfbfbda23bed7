"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastapi import APIRouter, Request, Response

from fastserve_mega.client import Chunk
from fastserve_mega.server.answers import Answer, Json
from fastserve_mega.server.choices import ChoicesShape, Endpoint
from fastserve_mega.server.errors import ApiError
from fastserve_mega.server.logprobs import CompletionLogprobs
from fastserve_mega.server.protocol import CompletionRequest
from fastserve_mega.server.service import Service

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default for this endpoint."""
ENDPOINT = Endpoint("cmpl", "text_completion", "text_completion")


@dataclass(frozen=True, slots=True)
class CompletionChoice:
    """How OpenAI writes completions."""

    index: int
    echo: str
    """The prompt's text, where the answer is to begin with it."""
    logprobs: Callable[[Chunk], Json | None]

    def whole(self, chunk: Chunk, reason: str) -> Json:
        return self._piece(self.echo + chunk.text, self.logprobs(chunk), reason)

    def opening(self) -> list[Json]:
        return [self._piece(self.echo)] if self.echo else []

    def delta(self, chunk: Chunk) -> list[Json]:
        return [self._piece(chunk.text, self.logprobs(chunk))]

    def closing(self, reason: str) -> list[Json]:
        return [self._piece("", None, reason)]

    def _piece(self, text: str, logprobs: Json | None = None, reason: str | None = None) -> Json:
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def completions_router(service: Service) -> APIRouter:
    """The endpoint, with its service."""
    router = APIRouter()

    @router.post("/v1/completions")
    async def create_completion(http: Request, body: CompletionRequest) -> Response:
        if not body.prompts:
            raise ApiError(400, "the prompt is empty", param="prompt")
        service.check_answers(len(body.prompts), body.answers_per_prompt)
        prompts, echoes = [], []
        for prompt in body.prompts:
            tokens = await service.encode(prompt) if isinstance(prompt, str) else prompt
            max_tokens = await service.max_tokens_of(tokens, body.max_tokens)
            if body.max_tokens is None:
                max_tokens = min(max_tokens, DEFAULT_MAX_TOKENS)
            prompts.append((tokens, max_tokens))
            echoes.append(service.text_of(prompt) if body.echo else "")
        ends = await service.end_token_ids(body)

        def choice(index: int) -> CompletionChoice:
            logprobs = CompletionLogprobs(service.tokenizer, ends)
            return CompletionChoice(index, echoes[index // body.answers_per_prompt], logprobs)

        answer_id, model = ENDPOINT.new_id(), await service.check_model(body.model)

        def shape(answer: Answer) -> ChoicesShape:
            return ChoicesShape(
                answer,
                ENDPOINT,
                answer_id=answer_id,
                model=model,
                stream=bool(body.stream),
                choice=choice,
                usage=body.usage_in_stream,
            )

        return await service.answer(http, body, prompts, shape, answer_id=answer_id)

    return router
