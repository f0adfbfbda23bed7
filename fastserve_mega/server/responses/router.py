"""POST /v1/responses, and GET and DELETE of those that are kept."""

from __future__ import annotations

import uuid
from collections import OrderedDict
from collections.abc import Callable

import msgspec
from fastapi import APIRouter, Request, Response

from fastserve_mega.server import openapi
from fastserve_mega.server.answers import Answer, Json
from fastserve_mega.server.conversation import Conversations
from fastserve_mega.server.errors import ApiError
from fastserve_mega.server.responses.protocol import Message, ResponsesRequest
from fastserve_mega.server.responses.shape import ResponseShape
from fastserve_mega.server.tools.pieces import ToolParser

MAX_BYTES = 64 * 2**20


class ResponseStore:
    """The newest responses of this process, with the conversations that led to them.

    Args:
        max_bytes: of all of them together; the one used longest ago makes room.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._bytes = 0

    def keep(self, response: Json, messages: list[Message]) -> None:
        """Keep a response, and the messages up to its end."""
        data = msgspec.json.encode((response, messages))
        self.delete(response["id"])
        self._kept[response["id"]] = data
        self._bytes += len(data)
        while self._bytes > self._max_bytes:
            self.delete(next(iter(self._kept)))

    def get(self, response_id: str) -> tuple[Json, list[Message]] | None:
        """A response and its messages, if it is kept."""
        if (data := self._kept.get(response_id)) is None:
            return None
        self._kept.move_to_end(response_id)
        response, messages = msgspec.json.decode(data)
        return response, messages

    def delete(self, response_id: str) -> bool:
        """Forget a response; False when it is not kept."""
        data = self._kept.pop(response_id, None)
        self._bytes -= len(data or b"")
        return data is not None


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

    @router.post("/v1/responses", responses=openapi.answers_with(openapi.Response))
    async def create_response(http: Request, body: ResponsesRequest) -> Response:
        messages = body.messages()
        if body.previous_response_id is not None:
            _, before = find(body.previous_response_id, "previous_response_id")
            messages = [*before, *messages]
        msgspec.json.encode(messages)  # text that could not be kept is refused before it costs

        def keep(response: Json, said: list[Message]) -> None:
            if body.store is not False:
                store.keep(response, [*messages, *said])

        def shape(answer: Answer, new_parser: Callable[[], ToolParser]) -> ResponseShape:
            return ResponseShape(
                answer,
                new_parser(),
                conversations.new_call_id,
                count_tokens=conversations.service.count_tokens,
                request=body,
                keep=keep,
            )

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
