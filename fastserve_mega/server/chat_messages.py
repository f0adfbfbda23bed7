"""The messages of a conversation, as the body of a chat completion has them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from fastserve_mega.server.strict import Neutral, Strict, short

MAX_MESSAGES = 4096
"""A conversation has no more; the template takes some 30 microseconds for each."""
_OTHER_MEDIA = {"image": "images", "audio": "recordings", "video": "videos", "file": "files"}
"""What a part's type may name, and how that is called."""
_UNSUPPORTED_MESSAGE: Neutral = {
    "refusal": (),
    "annotations": ([],),
    "audio": (),
    "function_call": (),
}


class TextPart(Strict):
    """A part of a message in OpenAI's list form; only text is supported."""

    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = None
    """Where a prompt may be kept for the next one: the prefix cache needs no such hint."""


def _refuse_media(part: object) -> object:
    """Say what is missing, before pydantic says which fields are.

    Raises:
        ValueError: the part is an image, or something else that is no text.
    """
    kind = part.get("type") if isinstance(part, dict) else None
    for word, name in _OTHER_MEDIA.items():
        if isinstance(kind, str) and word in kind:
            raise ValueError(f"{name} are not supported: the served model reads text only")
    return part


TEXT_ONLY = BeforeValidator(_refuse_media)


class CalledFunction(Strict):
    """Name and arguments of a call, as the assistant gave them."""

    name: str
    arguments: str | dict[str, Any] | None = None

    def plain(self) -> dict[str, Any]:
        """As chat templates know it: they write the arguments themselves."""
        if isinstance(self.arguments, dict):
            return {"name": self.name, "arguments": self.arguments}
        try:
            # Some clients write null for no arguments, as some models do.
            arguments = json.loads(self.arguments or "{}") or {}
        except (ValueError, RecursionError):
            raise ValueError(
                f"the arguments of a call of {self.name} are not valid JSON: "
                f"{short(self.arguments)}"
            ) from None
        return {"name": self.name, "arguments": arguments}


class ToolCall(Strict):
    """A call that the assistant made in an earlier turn."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None
    """Which call of its answer it was: clients that put a stream together send it back."""


class ChatMessage(Strict):
    """One turn of a conversation."""

    unsupported = _UNSUPPORTED_MESSAGE
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Annotated[TextPart, TEXT_ONLY]], Field(fail_fast=True)] | None = (
        None
    )
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    """What the assistant thought before this answer; the template decides whether it is told."""
    reasoning: str | None = None
    """vLLM's newer name of it."""
    cache_control: dict[str, Any] | None = None
    """As of a part."""

    @model_validator(mode="after")
    def _fields_of_its_role(self) -> ChatMessage:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls are for the role 'assistant', got {self.role!r}")
        if self.thoughts is not None and self.role != "assistant":
            raise ValueError(f"reasoning_content is for the role 'assistant', got {self.role!r}")
        if None not in (self.reasoning, self.reasoning_content) and (
            self.reasoning != self.reasoning_content
        ):
            raise ValueError("reasoning and reasoning_content are the same thing; send one of them")
        if self.tool_call_id is not None and self.role != "tool":
            raise ValueError(f"tool_call_id is for the role 'tool', got {self.role!r}")
        return self

    @property
    def thoughts(self) -> str | None:
        """The reasoning, under whichever name it came."""
        return self.reasoning if self.reasoning_content is None else self.reasoning_content

    @property
    def text(self) -> str:
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)

    def plain(self) -> dict[str, Any]:
        """The message as chat templates know it.

        Raises:
            ValueError: the arguments of a call are not JSON.
        """
        # OpenAI's newer name of the system role, which the templates of open models lack.
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": self.text}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.thoughts is not None:
            message["reasoning_content"] = self.thoughts
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": call.type, "function": call.function.plain()}
                for call in self.tool_calls
            ]
        return message


def few(whole: str, parts: str) -> BeforeValidator:
    """Limit a list before each of its elements is looked at; an error calls them so."""

    def check(given: object) -> object:
        if isinstance(given, list) and not 1 <= len(given) <= MAX_MESSAGES:
            raise ValueError(f"{whole} has 1 to {MAX_MESSAGES} {parts}, got {len(given)}")
        return given

    return BeforeValidator(check)


Messages = Annotated[list[ChatMessage], Field(fail_fast=True), few("a conversation", "messages")]
