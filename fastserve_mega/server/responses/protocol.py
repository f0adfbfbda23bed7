"""Body of POST /v1/responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from fastserve_mega.server.chat_protocol import TEXT_ONLY, ReasoningEffort, few
from fastserve_mega.server.protocol import PROMPT_CACHE, Common
from fastserve_mega.server.strict import Neutral, Strict
from fastserve_mega.server.structured import JsonObjectFormat, NamedSchema, TextFormat
from fastserve_mega.server.tools.protocol import MAX_TOOLS

Message = dict[str, Any]
"""A message of a chat completion."""
_UNSUPPORTED: Neutral = {
    "background": (False,),
    "context_management": (),
    "conversation": (),
    "max_tool_calls": (),
    "moderation": (),
    "prompt": (),
    **PROMPT_CACHE,
    "service_tier": ("auto", "default"),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
_Status = Literal["in_progress", "completed", "incomplete"] | None


class _Part(Strict):
    """A part of a message; what the assistant said comes back with annotations."""

    unsupported: ClassVar[Neutral] = {"annotations": ([],), "logprobs": ([],)}
    type: Literal["input_text", "output_text", "text", "reasoning_text", "summary_text"]
    text: str


Content = str | Annotated[list[Annotated[_Part, TEXT_ONLY]], Field(fail_fast=True)]


class MessageItem(Strict):
    """One turn of a conversation."""

    unsupported: ClassVar[Neutral] = {"phase": ("commentary", "final_answer")}
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    id: str | None = None
    status: _Status = None


class CallItem(Strict):
    """A call that the assistant made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: _Status = None


class ResultItem(Strict):
    """What a call has given."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content
    id: str | None = None
    status: _Status = None


class ReasoningItem(Strict):
    """What the assistant thought before what follows."""

    unsupported: ClassVar[Neutral] = {"encrypted_content": ()}
    type: Literal["reasoning"]
    content: Content | None = None
    summary: Content | None = None
    id: str | None = None
    status: _Status = None


Item = MessageItem | CallItem | ResultItem | ReasoningItem


def _with_type(item: object) -> object:
    return {"type": "message", **item} if isinstance(item, dict) else item


Items = Annotated[
    list[Annotated[Item, Field(discriminator="type"), BeforeValidator(_with_type)]],
    Field(fail_fast=True),
    few("the input", "items"),
]


class FunctionTool(Strict):
    """A function, without the wrapping of chat completions."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(Strict):
    """The function that is to be called."""

    type: Literal["function"]
    name: str

    def chat(self) -> dict[str, Any]:
        """As chat completions have it."""
        return {"type": "function", "function": {"name": self.name}}


class AllowedFunctions(Strict):
    """Functions that may, or must, be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Field(fail_fast=True)]

    def chat(self) -> dict[str, Any]:
        """As chat completions have it."""
        allowed = {"mode": self.mode, "tools": [tool.chat() for tool in self.tools]}
        return {"type": self.type, "allowed_tools": allowed}


class Reasoning(Strict):
    """How much is to be thought. Reasoning is told in full, so there is nothing to summarize."""

    unsupported: ClassVar[Neutral] = {
        "summary": ("auto", "concise", "detailed"),
        "generate_summary": ("auto", "concise", "detailed"),
    }
    effort: ReasoningEffort | None = None


class SchemaFormat(NamedSchema):
    """JSON that satisfies a schema."""

    type: Literal["json_schema"]


class TextConfig(Strict):
    """The form of the answer."""

    unsupported: ClassVar[Neutral] = {"verbosity": ("medium",)}
    format: (
        Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")] | None
    ) = None

    def response_format(self) -> dict[str, Any] | None:
        """As chat completions have it."""
        if isinstance(self.format, SchemaFormat):
            schema = self.format.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)
            return {"type": "json_schema", "json_schema": schema}
        return None if self.format is None else {"type": self.format.type}


class StreamOptions(Strict):
    """Nothing in it has an effect."""

    unsupported: ClassVar[Neutral] = {"include_obfuscation": (False,)}


class ResponsesRequest(Common):
    """Body of POST /v1/responses."""

    unsupported = _UNSUPPORTED
    input: str | Items
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    """Keep the conversation, for `previous_response_id`; true when it is not said."""
    max_output_tokens: int | None = Field(default=None, ge=1)
    tools: Annotated[list[FunctionTool], Field(fail_fast=True)] | None = Field(
        default=None, max_length=MAX_TOOLS
    )
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | AllowedFunctions | None = (
        None
    )
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None
    """Accepted since clients send it with `store: false`; reasoning is told in plain text."""
    stream_options: StreamOptions | None = None

    def messages(self) -> list[Message]:
        """What this request adds to the conversation, as messages of a chat completion."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        return messages_of(self.input)

    def chat(self, messages: Sequence[Message]) -> dict[str, Any]:
        """Body of the chat completion that answers a conversation."""
        instructions = (
            [{"role": "system", "content": self.instructions}] if self.instructions else []
        )
        tools = [
            {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
            for tool in self.tools or ()
        ]
        choice: Any = self.tool_choice
        if isinstance(choice, NamedFunction | AllowedFunctions):
            choice = choice.chat()
        given = {
            "messages": [*instructions, *messages],
            "max_tokens": self.max_output_tokens,
            "tools": tools or None,
            "tool_choice": choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
            "response_format": self.text.response_format() if self.text else None,
        }
        return {**self.common(), **given}


def messages_of(items: Sequence[Item]) -> list[Message]:
    """Items as messages: what the assistant thinks, says and calls in a row is one of them."""
    messages: list[Message] = []

    def assistant() -> Message:
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        return messages[-1]

    for item in items:
        match item:
            case MessageItem(role="assistant"):
                assistant()["content"] += _text_of(item.content)
            case MessageItem():
                messages.append({"role": item.role, "content": _text_of(item.content)})
            case CallItem():
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                assistant().setdefault("tool_calls", []).append(call)
            case ResultItem():
                messages.append(
                    {
                        "role": "tool",
                        "tool_call_id": item.call_id,
                        "content": _text_of(item.output),
                    }
                )
            case ReasoningItem():
                told = _text_of(item.content or item.summary or "")
                messages.append({"role": "assistant", "content": "", "reasoning_content": told})
    return messages


def _text_of(content: Content) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
