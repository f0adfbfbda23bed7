"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastapi import APIRouter, Request, Response

from fastserve_mega.client import Chunk
from fastserve_mega.server.answers import Json
from fastserve_mega.server.logprobs import chat_logprobs
from fastserve_mega.server.protocol import ChatRequest
from fastserve_mega.server.service import Endpoint, Service

ENDPOINT = Endpoint("chatcmpl", "chat.completion", "chat.completion.chunk")


@dataclass(frozen=True, slots=True)
class ChatChoice:
    """How OpenAI writes chat completions."""

    index: int
    logprobs: Callable[[Chunk], Json | None]

    def whole(self, text: str, chunk: Chunk, reason: str) -> Json:
        return {
            "index": self.index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self.logprobs(chunk),
            "finish_reason": reason,
        }

    def opening(self) -> list[Json]:
        return [self._piece({"role": "assistant", "content": ""})]

    def delta(self, chunk: Chunk) -> list[Json]:
        return [self._piece({"content": chunk.text}, self.logprobs(chunk))]

    def closing(self, reason: str) -> list[Json]:
        return [self._piece({}, None, reason)]

    def _piece(self, delta: Json, logprobs: Json | None = None, reason: str | None = None) -> Json:
        return {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def chat_router(service: Service) -> APIRouter:
    """The endpoint, with its service."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def create_chat_completion(http: Request, body: ChatRequest) -> Response:
        tokens = await service.encode_chat([message.plain() for message in body.messages])
        budget = await service.token_budget(tokens, body.token_limit)
        ends = await service.end_token_ids(body)

        def logprobs(chunk: Chunk) -> Json | None:
            return chat_logprobs(chunk, service.tokenizer.token_bytes, ends)

        def choice(index: int) -> ChatChoice:
            return ChatChoice(index, logprobs)

        return await service.answer(http, body, [(tokens, budget)], ENDPOINT, choice)

    return router
