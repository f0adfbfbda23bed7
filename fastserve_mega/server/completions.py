"""POST /v1/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from fastserve_mega.server.answers import Json
from fastserve_mega.server.errors import ApiError
from fastserve_mega.server.protocol import CompletionRequest
from fastserve_mega.server.service import Service

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default for this endpoint."""


class CompletionShape:
    """How OpenAI writes completions."""

    id_prefix = "cmpl"
    object_name = "text_completion"
    chunk_object_name = "text_completion"

    def choice(self, index: int, text: str, reason: str | None) -> Json:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}

    def opening(self, index: int) -> Json | None:
        return None

    def delta(self, index: int, text: str) -> Json:
        return self.choice(index, text, None)

    def closing(self, index: int, reason: str) -> Json:
        return self.choice(index, "", reason)


def completions_router(service: Service) -> APIRouter:
    """The endpoint, with its service."""
    router = APIRouter()

    @router.post("/v1/completions")
    async def create_completion(http: Request, body: CompletionRequest) -> Response:
        if not body.prompts:
            raise ApiError(400, "the prompt is empty", param="prompt")
        prompts = []
        for prompt in body.prompts:
            tokens = await service.encode(prompt) if isinstance(prompt, str) else prompt
            budget = await service.token_budget(tokens, body.max_tokens)
            if body.max_tokens is None:
                budget = min(budget, DEFAULT_MAX_TOKENS)
            prompts.append((tokens, budget))
        return await service.answer(http, body, prompts, CompletionShape())

    return router
