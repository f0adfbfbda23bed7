"""POST /v1/chat/completions."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence

from fastapi import APIRouter, Request, Response

from fastserve_mega.client import Chunk
from fastserve_mega.server.answers import Json
from fastserve_mega.server.chat_protocol import ChatRequest
from fastserve_mega.server.errors import ApiError
from fastserve_mega.server.logprobs import chat_logprobs
from fastserve_mega.server.service import Endpoint, Service
from fastserve_mega.server.tools.pieces import CallPiece, Piece, ToolParser

ENDPOINT = Endpoint("chatcmpl", "chat.completion", "chat.completion.chunk")


class ChatChoice:
    """How OpenAI writes chat completions.

    Args:
        index: of the answer.
        logprobs: writes the log probabilities of a piece.
        parser: tells tool calls from content.
    """

    def __init__(
        self, index: int, logprobs: Callable[[Chunk], Json | None], parser: ToolParser
    ) -> None:
        self._index = index
        self._logprobs = logprobs
        self._parser = parser
        self._has_called = False

    def whole(self, text: str, chunk: Chunk, reason: str) -> Json:
        content = ""
        calls: list[Json] = []
        for piece in (*self._parser.push(text), *self._parser.finish()):
            if isinstance(piece, str):
                content += piece
            elif piece.name is not None:
                calls.append(self._new_call(piece))
            else:
                calls[piece.index]["function"]["arguments"] += piece.arguments
        message: Json = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"content": content or None, "tool_calls": calls}
        return {
            "index": self._index,
            "message": message,
            "logprobs": self._logprobs(chunk),
            "finish_reason": self._reason(reason),
        }

    def opening(self) -> list[Json]:
        return [self._piece({"role": "assistant", "content": ""})]

    def delta(self, chunk: Chunk) -> list[Json]:
        deltas = self._deltas(self._parser.push(chunk.text))
        logprobs = self._logprobs(chunk)
        if not deltas and logprobs is None:
            return []
        first, *others = deltas or [{"content": ""}]
        return [self._piece(first, logprobs), *map(self._piece, others)]

    def closing(self, reason: str) -> list[Json]:
        rest = [self._piece(delta) for delta in self._deltas(self._parser.finish())]
        return [*rest, self._piece({}, None, self._reason(reason))]

    def _deltas(self, pieces: Sequence[Piece]) -> list[Json]:
        return [
            {"content": piece} if isinstance(piece, str) else {"tool_calls": [self._call(piece)]}
            for piece in pieces
        ]

    def _call(self, piece: CallPiece) -> Json:
        """A piece of a call as a stream tells it."""
        if piece.name is None:
            return {"index": piece.index, "function": {"arguments": piece.arguments}}
        return {"index": piece.index, **self._new_call(piece)}

    def _new_call(self, piece: CallPiece) -> Json:
        self._has_called = True
        return {
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": piece.name, "arguments": piece.arguments},
        }

    def _reason(self, reason: str) -> str:
        if reason == "stop" and self._has_called and not self._parser.is_forced:
            return "tool_calls"
        return reason

    def _piece(self, delta: Json, logprobs: Json | None = None, reason: str | None = None) -> Json:
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def chat_router(
    service: Service, new_tool_parser: Callable[[], ToolParser] | None = None
) -> APIRouter:
    """The endpoint.

    Args:
        service: what it needs.
        new_tool_parser: reads tool calls as the model writes them; None refuses tools.
    """
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def create_chat_completion(http: Request, body: ChatRequest) -> Response:
        if body.is_about_tools and new_tool_parser is None:
            raise ApiError(
                400,
                "tools are not supported: the model's chat template has none, or "
                "server.tool_parser does not say how it writes calls",
                param="tools" if body.offered_tools else "messages",
            )
        try:
            messages = body.plain_messages()
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from None
        tokens = await service.encode_chat(messages, body.offered_tools)
        max_tokens = await service.max_tokens_of(tokens, body.max_tokens_asked)
        ends = await service.end_token_ids(body)

        def logprobs(chunk: Chunk) -> Json | None:
            return chat_logprobs(chunk, service.tokenizer.token_bytes, ends)

        def choice(index: int) -> ChatChoice:
            return ChatChoice(index, logprobs, body.tool_parser(new_tool_parser))

        return await service.answer(http, body, [(tokens, max_tokens)], ENDPOINT, choice)

    return router
