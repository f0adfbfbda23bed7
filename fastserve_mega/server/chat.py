"""POST /v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from fastserve_mega.server.answers import Json
from fastserve_mega.server.protocol import ChatRequest
from fastserve_mega.server.service import Service


class ChatShape:
    """How OpenAI writes chat completions."""

    id_prefix = "chatcmpl"
    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def choice(self, index: int, text: str, reason: str) -> Json:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": reason}

    def opening(self, index: int) -> Json | None:
        return self._piece(index, {"role": "assistant", "content": ""}, None)

    def delta(self, index: int, text: str) -> Json:
        return self._piece(index, {"content": text}, None)

    def closing(self, index: int, reason: str) -> Json:
        return self._piece(index, {}, reason)

    @staticmethod
    def _piece(index: int, delta: Json, reason: str | None) -> Json:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


def chat_router(service: Service) -> APIRouter:
    """The endpoint, with its service."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def create_chat_completion(http: Request, body: ChatRequest) -> Response:
        tokens = await service.encode_chat([message.plain() for message in body.messages])
        budget = await service.token_budget(tokens, body.token_limit)
        return await service.answer(http, body, [(tokens, budget)], ChatShape())

    return router
