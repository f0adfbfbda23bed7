"""POST /v1/messages, and how Anthropic writes a message."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable

from fastapi import APIRouter, Request, Response

from fastserve_mega.server import openapi
from fastserve_mega.server.answers import Answer, Json, encode_event
from fastserve_mega.server.blocks import Block, BlockShape
from fastserve_mega.server.conversation import Conversations
from fastserve_mega.server.errors import ANTHROPIC_PATH, ApiError
from fastserve_mega.server.messages.protocol import CountRequest, MessagesRequest
from fastserve_mega.server.tools.pieces import ToolParser

_NOT_JSON = "INVALID_JSON"
"""Where Anthropic's documentation puts arguments that were cut."""
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens"}


class MessageShape(BlockShape):
    """Each event has the name of its type."""

    def body(self) -> Json:
        has_ended = self.all_told
        return {
            "id": self.answer.answer_id,
            "type": "message",
            "role": "assistant",
            "model": self.answer.model,
            "content": [_whole(block) for block in self.blocks],
            "stop_reason": self._stop_reason() if has_ended else None,
            "stop_sequence": self._stop_sequence() if has_ended else None,
            "usage": self._usage(),
        }

    def started(self) -> Iterable[bytes]:
        yield _event("message_start", message=self.body())

    def began(self, block: Block) -> Iterable[bytes]:
        yield _event("content_block_start", index=block.index, content_block=_empty(block))

    def grew(self, block: Block, text: str) -> Iterable[bytes]:
        yield _event("content_block_delta", index=block.index, delta=_delta(block, text))

    def ended(self, block: Block) -> Iterable[bytes]:
        yield _event("content_block_stop", index=block.index)

    def finished(self) -> Iterable[bytes]:
        delta = {"stop_reason": self._stop_reason(), "stop_sequence": self._stop_sequence()}
        yield _event("message_delta", delta=delta, usage=self._usage())
        yield _event("message_stop")

    def failure(self, error: ApiError) -> Iterable[bytes]:
        yield encode_event(error.anthropic_body, "error")

    def _stop_sequence(self) -> str | None:
        return self.answer.generations[0].stopped_by

    def _stop_reason(self) -> str:
        reason = self.answer.reason(0)
        if reason == "stop" and self._stop_sequence() is not None:
            return "stop_sequence"
        if reason == "stop" and any(block.kind == "call" for block in self.blocks):
            return "tool_use"
        return _STOP_REASONS.get(reason, reason)

    def _usage(self) -> Json:
        usage = self.answer.usage
        return {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached_tokens,
            "output_tokens": usage.completion_tokens,
        }


def _event(name: str, **fields: object) -> bytes:
    return encode_event({"type": name, **fields}, name)


def _empty(block: Block) -> Json:
    if block.kind == "call":
        return {"type": "tool_use", "id": block.item_id, "name": block.name, "input": {}}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": ""}


def _whole(block: Block) -> Json:
    if block.kind == "call":
        return {**_empty(block), "input": _arguments(block.text)}
    return {**_empty(block), "thinking" if block.kind == "reasoning" else "text": block.text}


def _arguments(text: str) -> Json:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {_NOT_JSON: text}
    return value if isinstance(value, dict) else {_NOT_JSON: text}


def _delta(block: Block, text: str) -> Json:
    if block.kind == "call":
        return {"type": "input_json_delta", "partial_json": text}
    if block.kind == "reasoning":
        return {"type": "thinking_delta", "thinking": text}
    return {"type": "text_delta", "text": text}


def messages_router(conversations: Conversations) -> APIRouter:
    """The endpoints."""
    router = APIRouter()

    @router.post(
        ANTHROPIC_PATH, responses=openapi.answers_with(openapi.Message, openapi.ANTHROPIC_ERRORS)
    )
    async def create_message(http: Request, body: MessagesRequest) -> Response:
        def shape(answer: Answer, new_parser: Callable[[], ToolParser]) -> MessageShape:
            return MessageShape(answer, new_parser(), conversations.new_call_id)

        chat = conversations.chat_request(body.chat())
        return await conversations.answer(http, chat, shape, f"msg_{uuid.uuid4().hex}")

    @router.post(f"{ANTHROPIC_PATH}/count_tokens", responses=openapi.ANTHROPIC_ERRORS)
    async def count_tokens(body: CountRequest) -> Json:
        await conversations.service.check_model(body.model)
        _, prompt = await conversations.render(conversations.chat_request(body.chat()))
        return {"input_tokens": len(prompt)}

    return router
