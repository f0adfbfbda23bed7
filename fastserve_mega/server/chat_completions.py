"""POST /v1/chat/completions."""

from __future__ import annotations

import json
from collections.abc import Callable

from fastapi import APIRouter, Request, Response

from fastserve_mega.client import Chunk
from fastserve_mega.server.answers import Answer, Json
from fastserve_mega.server.chat_protocol import ChatRequest
from fastserve_mega.server.choices import ChoicesShape, Endpoint
from fastserve_mega.server.conversation import Conversations
from fastserve_mega.server.logprobs import chat_logprobs, prompt_logprobs
from fastserve_mega.server.openapi import ChatCompletion, answers_with
from fastserve_mega.server.tools.pieces import CallPiece, Piece, Reasoning, ToolParser

ENDPOINT = Endpoint("chatcmpl", "chat.completion", "chat.completion.chunk")


class ChatChoice:
    """How OpenAI writes chat completions.

    Args:
        index: of the answer.
        logprobs: writes the log probabilities of a piece.
        parser: tells tool calls and reasoning from content.
        new_call_id: names a call.
    """

    def __init__(
        self,
        index: int,
        logprobs: Callable[[Chunk], Json | None],
        parser: ToolParser,
        new_call_id: Callable[[], str],
    ) -> None:
        self._index = index
        self._logprobs = logprobs
        self._parser = parser
        self._new_call_id = new_call_id
        self._arguments: str | None = None
        """What the last call has so far; None before the first call."""

    def whole(self, chunk: Chunk, reason: str) -> Json:
        content = reasoning = ""
        calls: list[Json] = []
        for piece in (*self._parser.push(chunk.text), *self._parser.finish()):
            if isinstance(piece, str):
                content += piece
            elif isinstance(piece, Reasoning):
                reasoning += piece.text
            elif piece.name is not None:
                calls.append(self._new_call(piece))
            else:
                calls[piece.index]["function"]["arguments"] += self._more_arguments(piece)
        message: Json = {"role": "assistant", "content": content, "refusal": None}
        if reasoning:
            message["reasoning_content"] = reasoning
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
        deltas = [self._delta(piece) for piece in self._parser.push(chunk.text)]
        logprobs = self._logprobs(chunk)
        if not deltas and logprobs is None:
            return []
        first, *others = deltas or [{"content": ""}]
        return [self._piece(first, logprobs), *map(self._piece, others)]

    def closing(self, reason: str) -> list[Json]:
        rest = [self._piece(self._delta(piece)) for piece in self._parser.finish()]
        return [*rest, self._piece({}, None, self._reason(reason))]

    def _delta(self, piece: Piece) -> Json:
        if isinstance(piece, str):
            return {"content": piece}
        if isinstance(piece, Reasoning):
            return {"reasoning_content": piece.text}
        return {"tool_calls": [self._call(piece)]}

    def _call(self, piece: CallPiece) -> Json:
        """A piece of a call as a stream tells it."""
        if piece.name is None:
            return {"index": piece.index, "function": {"arguments": self._more_arguments(piece)}}
        return {"index": piece.index, **self._new_call(piece)}

    def _more_arguments(self, piece: CallPiece) -> str:
        self._arguments = (self._arguments or "") + piece.arguments
        return piece.arguments

    def _new_call(self, piece: CallPiece) -> Json:
        self._arguments = piece.arguments
        return {
            "id": self._new_call_id(),
            "type": "function",
            "function": {"name": piece.name, "arguments": piece.arguments},
        }

    def _reason(self, reason: str) -> str:
        """The reason `tool_calls` promises whole calls: none that a stop string has cut."""
        if reason != "stop" or self._arguments is None or self._parser.is_forced:
            return reason
        return "tool_calls" if _is_json(self._arguments) else reason

    def _piece(self, delta: Json, logprobs: Json | None = None, reason: str | None = None) -> Json:
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def chat_router(conversations: Conversations) -> APIRouter:
    """The endpoint."""
    router = APIRouter()
    service = conversations.service

    @router.post("/v1/chat/completions", responses=answers_with(ChatCompletion))
    async def create_chat_completion(http: Request, body: ChatRequest) -> Response:
        ends = await service.end_token_ids(body)

        def logprobs(chunk: Chunk) -> Json | None:
            return chat_logprobs(
                chunk, service.tokenizer.token_bytes, ends, body.top_logprobs_asked
            )

        def shape(answer: Answer, new_parser: Callable[[], ToolParser]) -> ChoicesShape:
            def choice(index: int) -> ChatChoice:
                return ChatChoice(index, logprobs, new_parser(), conversations.new_call_id)

            def of_prompt() -> Json:
                first, token_bytes = answer.generations[0], service.tokenizer.token_bytes
                return prompt_logprobs(first, token_bytes, body.prompt_logprobs)

            return ChoicesShape(answer, ENDPOINT, choice, of_prompt)

        return await conversations.answer(http, body, shape, ENDPOINT.new_id())

    return router
