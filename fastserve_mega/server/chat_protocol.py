"""Body of POST /v1/chat/completions: the messages of a conversation, and how to answer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from fastserve_mega.server.protocol import PROMPT_CACHE, UNSUPPORTED, GenerationRequest
from fastserve_mega.server.strict import Neutral, Strict
from fastserve_mega.server.structured import from_schema
from fastserve_mega.server.tools.forced import (
    NamedCall,
    RequiredCalls,
    named_schema,
    required_schema,
)
from fastserve_mega.server.tools.pieces import ToolParser
from fastserve_mega.server.tools.protocol import MAX_TOOLS, AllowedTools, NamedTool, Tool, ToolCall
from fastserve_mega.text.chat_template import PromptEnd
from fastserve_mega.types import MAX_TOP_LOGPROBS, StructuredOutput

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
_UNSUPPORTED_CHAT: Neutral = UNSUPPORTED | {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "moderation": (),
    "prediction": (),
    **PROMPT_CACHE,
    "verbosity": ("medium",),
    "web_search_options": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "add_special_tokens": (False,),  # the template writes them
}
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


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


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    unsupported = _UNSUPPORTED_CHAT
    messages: Messages
    max_completion_tokens: int | None = None
    """The newer name of max_tokens."""
    reasoning_effort: ReasoningEffort | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """vLLM's: variables of the chat template."""
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    """vLLM's: the answer goes on with the assistant's last message."""
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)

    @model_validator(mode="after")
    def _logprobs_for_top(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError(f"top_logprobs={self.top_logprobs} needs logprobs=true")
        return self

    @model_validator(mode="after")
    def _message_to_go_on_with(self) -> ChatRequest:
        if not self.continue_final_message:
            return self
        if self.add_generation_prompt:
            raise ValueError(
                "continue_final_message=true goes on with a message, "
                "add_generation_prompt=true begins one; send one of them"
            )
        last = self.messages[-1]
        if last.role != "assistant" or not last.text or last.tool_calls:
            raise ValueError(
                "messages must end with one of the assistant's that has text and no calls, for "
                "the answer to go on with it"
            )
        return self

    @property
    def continues_text(self) -> bool:
        return bool(self.continue_final_message)

    @property
    def prompt_end(self) -> PromptEnd:
        if self.continue_final_message:
            return "open message"
        return "closed message" if self.add_generation_prompt is False else "answer"

    @property
    def top_logprobs_asked(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _one_limit(self) -> ChatRequest:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ValueError(
                f"max_tokens ({self.max_tokens}) and max_completion_tokens "
                f"({self.max_completion_tokens}) are the same thing; send one of them"
            )
        return self

    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = Field(
        default=None, max_length=MAX_TOOLS
    )
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _choice_among_tools(self) -> ChatRequest:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError(f"tools must have names of their own, got {names}")
        wanted = {self.tool_choice.function.name} if isinstance(self.tool_choice, NamedTool) else ()
        if isinstance(self.tool_choice, AllowedTools):
            wanted = self.tool_choice.names
        if stray := sorted(set(wanted).difference(names)):
            raise ValueError(f"tool_choice names {stray[0]!r}, which is not among the tools")
        if isinstance(self.tool_choice, AllowedTools):
            # A model knows of no choice: it is told of those tools only.
            self.tools = [tool for tool in self.tools or () if tool.function.name in wanted]
            self.tool_choice = self.tool_choice.allowed_tools.mode
        elif self.tool_choice == "required" and not names:
            raise ValueError("tool_choice='required' needs tools")
        return self

    def plain_messages(self) -> list[dict[str, Any]]:
        """The conversation as chat templates know it.

        Some want the name of the function with its result, which OpenAI's clients do not send.

        Raises:
            ValueError: the arguments of a call are not JSON.
        """
        names: dict[str | None, str] = {}
        plain = []
        for message in self.messages:
            names |= {call.id: call.function.name for call in message.tool_calls or ()}
            plain.append(message.plain())
            if message.role == "tool" and message.name is None and message.tool_call_id in names:
                plain[-1]["name"] = names[message.tool_call_id]
        return plain

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """The tools as chat templates know them; none when the model is not to call any."""
        if self.tool_choice == "none":
            return []
        return [{"type": tool.type, "function": tool.function.plain()} for tool in self.tools or ()]

    @property
    def forces_call(self) -> bool:
        """Whether the answer has to be a call; its form is then known, whatever the model."""
        return bool(self.offered_tools) and self.tool_choice not in (None, "auto")

    @property
    def functions(self) -> dict[str, dict[str, Any] | None]:
        """The functions that may be called, with the schemas of their arguments."""
        if self.tool_choice == "none":
            return {}
        return {tool.function.name: tool.function.parameters for tool in self.tools or ()}

    def forced_parser(self) -> ToolParser:
        """What reads a call that `tool_choice` forces."""
        if isinstance(self.tool_choice, NamedTool):
            return NamedCall(self.tool_choice.function.name)
        return RequiredCalls()

    def _forced_call(self) -> StructuredOutput | None:
        if isinstance(self.tool_choice, NamedTool):
            return from_schema(named_schema(self.functions, self.tool_choice.function.name))
        if self.tool_choice == "required":
            several = self.parallel_tool_calls is not False
            return from_schema(required_schema(self.functions, several=several))
        return None

    @property
    def max_tokens_asked(self) -> int | None:
        """Longest answer in tokens; None is the rest of the context."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        return self.max_tokens
