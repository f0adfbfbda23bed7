"""POST /v1/responses, and GET and DELETE of those that are kept."""

from __future__ import annotations

import uuid

from fastapi import APIRouter, Request, Response

from fastserve_mega.server import schemas
from fastserve_mega.server.answers import Json
from fastserve_mega.server.conversation import ChatAnswer, Conversations
from fastserve_mega.server.errors import ApiError
from fastserve_mega.server.openapi import answers_with
from fastserve_mega.server.responses.protocol import Message, ResponsesRequest
from fastserve_mega.server.responses.shape import ResponseShape
from fastserve_mega.server.responses.store import ResponseStore


def responses_router(conversations: Conversations, store: ResponseStore) -> APIRouter:
    """The endpoints.

    Args:
        conversations: answers them.
        store: keeps the responses.
    """
    router = APIRouter()

    def find(response_id: str, param: str | None = None) -> tuple[Json, list[Message]]:
        if (found := store.get(response_id)) is None:
            raise ApiError(
                404,
                f"the response {response_id!r} is not kept here: it was not stored, was "
                "deleted or displaced by newer ones, or belongs to another server",
                param=param,
                code="response_not_found",
            )
        return found

    @router.post("/v1/responses", responses=answers_with(schemas.Response))
    async def create_response(http: Request, body: ResponsesRequest) -> Response:
        messages = body.messages()
        if body.previous_response_id is not None:
            _, before = find(body.previous_response_id, "previous_response_id")
            messages = [*before, *messages]

        def keep(response: Json, said: list[Message]) -> None:
            if body.store is not False:
                store.keep(response, [*messages, *said])

        def shape(chat: ChatAnswer) -> ResponseShape:
            return ResponseShape(chat, body, keep)

        chat = conversations.chat_request(body.chat(messages))
        return await conversations.answer(http, chat, shape, f"resp_{uuid.uuid4().hex}")

    @router.get("/v1/responses/{response_id}")
    async def get_response(response_id: str) -> Json:
        return find(response_id)[0]

    @router.delete("/v1/responses/{response_id}")
    async def delete_response(response_id: str) -> Json:
        find(response_id)
        store.delete(response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    return router
