"""POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import uuid

from fastapi import APIRouter, Request, Response

from fastserve_mega.server import schemas
from fastserve_mega.server.answers import Json
from fastserve_mega.server.conversation import Conversations
from fastserve_mega.server.errors import ANTHROPIC_PATH
from fastserve_mega.server.messages.protocol import CountRequest, MessagesRequest
from fastserve_mega.server.messages.shape import MessageShape
from fastserve_mega.server.openapi import ANTHROPIC_ERRORS, answers_with


def messages_router(conversations: Conversations) -> APIRouter:
    """The endpoints."""
    router = APIRouter()

    @router.post(ANTHROPIC_PATH, responses=answers_with(schemas.Message, ANTHROPIC_ERRORS))
    async def create_message(http: Request, body: MessagesRequest) -> Response:
        chat = conversations.chat_request(body.chat())
        return await conversations.answer(http, chat, MessageShape, f"msg_{uuid.uuid4().hex}")

    @router.post(f"{ANTHROPIC_PATH}/count_tokens", responses=ANTHROPIC_ERRORS)
    async def count_tokens(body: CountRequest) -> Json:
        await conversations.service.check_model(body.model)
        prompt = await conversations.render(conversations.chat_request(body.chat()))
        return {"input_tokens": len(prompt.token_ids)}

    return router
