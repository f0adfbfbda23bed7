"""Body of POST /v1/messages, and of its count_tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from fastserve_mega.server.chat_protocol import TEXT_ONLY, few
from fastserve_mega.server.protocol import Common
from fastserve_mega.server.strict import Neutral, Strict, Texts
from fastserve_mega.server.tools.protocol import MAX_TOOLS

Message = dict[str, Any]
"""A message of a chat completion."""
_UNSUPPORTED: Neutral = {
    "container": (),
    "diagnostics": (),
    "inference_geo": (),
    "service_tier": ("auto", "standard_only"),
    "speed": ("standard",),
    "mcp_servers": ([],),
    "context_management": (
        {"edits": []},
        {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    ),
}


class _Cacheable(Strict):
    """Prefixes are cached without being asked."""

    unsupported: ClassVar[Neutral] = {"citations": ([],), "caller": ({"type": "direct"},)}
    cache_control: dict[str, Any] | None = None


class TextBlock(_Cacheable):
    """Text."""

    type: Literal["text"]
    text: str


class ThinkingBlock(Strict):
    """What the assistant thought. The signature is not looked at."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class ToolUseBlock(_Cacheable):
    """A call that the assistant made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


Texted = str | Annotated[list[Annotated[TextBlock, TEXT_ONLY]], Field(fail_fast=True)]


class ToolResultBlock(_Cacheable):
    """What a call has given."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Texted | None = None
    is_error: bool | None = None


Block = Annotated[
    Annotated[
        TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")
    ],
    TEXT_ONLY,
]


class Turn(Strict):
    """One turn of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[Block], Field(fail_fast=True)]

    @model_validator(mode="after")
    def _blocks_of_its_role(self) -> Turn:
        for block in self.content if isinstance(self.content, list) else ():
            if isinstance(block, ThinkingBlock | ToolUseBlock) and self.role != "assistant":
                raise ValueError(f"a {block.type} block is for the role 'assistant'")
            if isinstance(block, ToolResultBlock) and self.role != "user":
                raise ValueError("a tool_result block is for the role 'user'")
        return self

    def messages(self) -> list[Message]:
        """The turn as messages of a chat completion: results of calls are messages of their own."""
        if isinstance(self.content, str):
            return [{"role": self.role, "content": self.content}]
        results = [_result(b) for b in self.content if isinstance(b, ToolResultBlock)]
        text = "".join(block.text for block in self.content if isinstance(block, TextBlock))
        message: Message = {"role": self.role, "content": text}
        for block in self.content:
            if isinstance(block, ThinkingBlock):
                before = message.get("reasoning_content", "")
                message["reasoning_content"] = before + block.thinking
            elif isinstance(block, ToolUseBlock):
                arguments = json.dumps(block.input, ensure_ascii=False)
                function = {"name": block.name, "arguments": arguments}
                call = {"id": block.id, "type": "function", "function": function}
                message.setdefault("tool_calls", []).append(call)
        return results if results and not text else [*results, message]


def _result(block: ToolResultBlock) -> Message:
    parts = block.content or ""
    text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
    told = f"Error: {text}" if block.is_error else text
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": told}


class Tool(_Cacheable):
    """A function that the model may call."""

    unsupported: ClassVar[Neutral] = {
        "allowed_callers": (["direct"],),
        "defer_loading": (False,),
        "eager_input_streaming": (False, True),  # arguments are always told as they come
        "input_examples": ([],),
    }
    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class ToolChoice(Strict):
    """Whether a call is to be made, and of which function."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _name_for_tool(self) -> ToolChoice:
        if (self.name is not None) != (self.type == "tool"):
            raise ValueError("tool_choice has a name if its type is 'tool', and no other")
        return self

    def chat(self) -> Any:
        """As chat completions have it."""
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name}}
        return "required" if self.type == "any" else self.type


class Thinking(Strict):
    """Whether the model is to think before it answers."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    """Accepted since clients must send it; only max_tokens ends an answer."""
    display: Literal["summarized"] | None = None


class OutputFormat(Strict):
    """JSON that satisfies a schema."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    """How much is to be thought, and the form of the answer."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountRequest(Common):
    """Body of POST /v1/messages/count_tokens."""

    unsupported = _UNSUPPORTED
    messages: Annotated[list[Turn], Field(fail_fast=True), few("a conversation", "messages")]
    system: Texted | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = Field(
        default=None, max_length=MAX_TOOLS
    )
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: dict[str, Any] | None = None

    def chat(self) -> dict[str, Any]:
        """Body of the chat completion that answers the conversation."""
        choice = self.tool_choice
        turns = self.messages
        if turns[-1].role == "assistant" and not turns[-1].content:
            turns = turns[:-1]  # an answer of which nothing is there yet
        return {
            **self.common(),
            "messages": [*self._system(), *_flat(turns)],
            "tools": [_function(tool) for tool in self.tools or ()] or None,
            "tool_choice": choice.chat() if choice else None,
            "parallel_tool_calls": not (choice and choice.disable_parallel_tool_use),
            "reasoning_effort": self._effort(),
            "response_format": self._response_format(),
            "continue_final_message": bool(turns) and turns[-1].role == "assistant",
        }

    def _system(self) -> list[Message]:
        if not self.system:
            return []
        parts = self.system
        text = parts if isinstance(parts, str) else "\n".join(part.text for part in parts)
        return [{"role": "system", "content": text}]

    def _effort(self) -> str | None:
        effort = self.output_config.effort if self.output_config else None
        if self.thinking is not None and self.thinking.type == "disabled":
            return "none"
        if effort is None and self.thinking is not None and self.thinking.type == "enabled":
            return "medium"
        return "xhigh" if effort == "max" else effort

    def _response_format(self) -> dict[str, Any] | None:
        if self.output_config is None or self.output_config.format is None:
            return None
        schema = {"name": "answer", "schema": self.output_config.format.schema_}
        return {"type": "json_schema", "json_schema": schema}


class MessagesRequest(CountRequest):
    """Body of POST /v1/messages."""

    max_tokens: int
    stop_sequences: Texts | None = None

    def chat(self) -> dict[str, Any]:
        return {**super().chat(), "max_tokens": self.max_tokens, "stop": self.stop_sequences}


def _flat(turns: Sequence[Turn]) -> list[Message]:
    return [message for turn in turns for message in turn.messages()]


def _function(tool: Tool) -> dict[str, Any]:
    function = {
        "name": tool.name, "description": tool.description, "parameters": tool.input_schema,
    }  # fmt: skip
    return {"type": "function", "function": function}
