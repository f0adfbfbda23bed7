"""How OpenAI writes a response."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable

from fastserve_mega.server.answers import Answer, Json, encode_event
from fastserve_mega.server.blocks import Block, BlockKind, BlockShape
from fastserve_mega.server.errors import ApiError
from fastserve_mega.server.responses.protocol import Message, ResponsesRequest
from fastserve_mega.server.tools.pieces import ToolParser

_PREFIXES: dict[BlockKind, str] = {"reasoning": "rs", "text": "msg", "call": "fc"}
_PARTS: dict[BlockKind, str] = {"reasoning": "reasoning_text", "text": "output_text"}
_STATUS = {"stop": "completed", "abort": "cancelled"}


class ResponseShape(BlockShape):
    """Each event has a number and the name of its type.

    Args:
        answer: what is written.
        parser: reads it.
        new_call_id: names a tool call.
        count_tokens: of a text that the model has written.
        request: whose settings the response repeats.
        keep: takes the finished response, and what the assistant has said as messages.
    """

    def __init__(
        self,
        answer: Answer,
        parser: ToolParser,
        new_call_id: Callable[[], str],
        *,
        count_tokens: Callable[[str], int],
        request: ResponsesRequest,
        keep: Callable[[Json, list[Message]], None],
    ) -> None:
        super().__init__(answer, parser, new_call_id)
        self._count_tokens = count_tokens
        self._keep = keep
        self._call_ids: dict[int, str] = {}
        self._events = 0
        self._status = "in_progress"
        self._error: Json | None = None
        self._head = _head(answer, request)

    def body(self) -> Json:
        reason = self.answer.reason(0)
        details = {"reason": "max_output_tokens" if reason == "length" else reason}
        items = [self._item(block) for block in self.blocks]
        return {
            **self._head,
            "status": self._status,
            "error": self._error,
            "incomplete_details": details if self._status == "incomplete" else None,
            "output": [] if self._status == "in_progress" else items,
            "usage": None if self._status == "in_progress" else self._usage(),
        }

    def started(self) -> Iterable[bytes]:
        yield self._event("response.created", response=self.body())
        yield self._event("response.in_progress", response=self.body())

    def began(self, block: Block) -> Iterable[bytes]:
        if block.kind == "call":
            self._call_ids[block.index] = self.new_call_id()
        item = self._item(block, "in_progress")
        yield self._event("response.output_item.added", output_index=block.index, item=item)
        if block.kind != "call":
            yield self._of("response.content_part.added", block, part=_part(block, ""))

    def grew(self, block: Block, text: str) -> Iterable[bytes]:
        yield self._of(f"{_stem(block)}.delta", block, delta=text, **_logprobs(block))

    def ended(self, block: Block) -> Iterable[bytes]:
        name = "arguments" if block.kind == "call" else "text"
        yield self._of(f"{_stem(block)}.done", block, **{name: block.text}, **_logprobs(block))
        if block.kind != "call":
            part = _part(block, block.text)
            yield self._of("response.content_part.done", block, part=part)
        item = self._item(block)
        yield self._event("response.output_item.done", output_index=block.index, item=item)

    def finished(self) -> Iterable[bytes]:
        self._status = _STATUS.get(self.answer.reason(0), "incomplete")
        body = self.body()
        self._keep(body, self._said())
        name = "completed" if self._status == "completed" else "incomplete"
        yield self._event(f"response.{name}", response=body)

    def failure(self, error: ApiError) -> Iterable[bytes]:
        told = error.body["error"]
        self._status, self._error = "failed", {"code": "server_error", "message": told["message"]}
        kinds = {name: told[name] for name in ("code", "message", "param")}
        yield self._event("error", **kinds)
        yield self._event("response.failed", response=self.body())

    def new_item_id(self, kind: BlockKind) -> str:
        return f"{_PREFIXES[kind]}_{uuid.uuid4().hex}"

    def _event(self, name: str, **fields: object) -> bytes:
        self._events += 1
        return encode_event({"type": name, "sequence_number": self._events - 1, **fields}, name)

    def _of(self, name: str, block: Block, **fields: object) -> bytes:
        """An event about a block."""
        place = {"item_id": block.item_id, "output_index": block.index}
        if block.kind != "call":
            place["content_index"] = 0
        return self._event(name, **place, **fields)

    def _item(self, block: Block, status: str = "") -> Json:
        is_last = self.all_told and block is self.blocks[-1]
        is_cut = is_last and self.answer.reason(0) != "stop"
        status = status or ("incomplete" if is_cut else "completed")
        if block.kind == "call":
            return {
                "type": "function_call",
                "id": block.item_id,
                "call_id": self._call_ids[block.index],
                "name": block.name,
                "arguments": block.text,
                "status": status,
            }
        content = [] if status == "in_progress" else [_part(block, block.text)]
        item: Json = {"id": block.item_id, "content": content, "status": status}
        if block.kind == "reasoning":
            return {"type": "reasoning", "summary": [], **item}
        return {"type": "message", "role": "assistant", **item}

    def _said(self) -> list[Message]:
        message: Message = {"role": "assistant", "content": ""}
        for block in self.blocks:
            if block.kind == "call":
                function = {"name": block.name, "arguments": block.text}
                call = {"id": self._call_ids[block.index], "type": "function", "function": function}
                message.setdefault("tool_calls", []).append(call)
            else:
                name = "content" if block.kind == "text" else "reasoning_content"
                message[name] = message.get(name, "") + block.text
        return [message]

    def _usage(self) -> Json:
        usage = self.answer.usage
        thought = "".join(block.text for block in self.blocks if block.kind == "reasoning")
        return {
            "input_tokens": usage.prompt_tokens,
            # Nothing is charged for keeping KV.
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._count_tokens(thought)},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }


def _head(answer: Answer, request: ResponsesRequest) -> Json:
    told = request.model_dump(mode="json", by_alias=True)
    return {
        "id": answer.answer_id,
        "object": "response",
        "created_at": int(time.time()),
        "model": answer.model,
        "background": False,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "reasoning": {"effort": request.reasoning and request.reasoning.effort, "summary": None},
        "store": request.store is not False,
        "temperature": request.temperature,
        "text": {"format": (told["text"] or {}).get("format") or {"type": "text"}},
        "tool_choice": told["tool_choice"] or "auto",
        "tools": told["tools"] or [],
        "top_p": request.top_p,
        "truncation": "disabled",
        "user": request.user,
    }


def _stem(block: Block) -> str:
    if block.kind == "call":
        return "response.function_call_arguments"
    return f"response.{_PARTS[block.kind]}"


def _part(block: Block, text: str) -> Json:
    part: Json = {"type": _PARTS[block.kind], "text": text}
    return part if block.kind == "reasoning" else {**part, "annotations": [], "logprobs": []}


def _logprobs(block: Block) -> Json:
    return {"logprobs": []} if block.kind == "text" else {}
