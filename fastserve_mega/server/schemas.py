"""What the endpoints answer, for the OpenAPI document: nothing is computed with these.

tests/unit/test_openapi.py holds real answers to them.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetails(_Schema):
    """What is wrong, in one sentence."""

    message: str
    type: str
    param: str | None
    """The field that is wrong."""
    code: str | None


class Error(_Schema):
    """OpenAI's shape."""

    error: ErrorDetails


class CachedTokens(_Schema):
    """Prompt tokens that were found in the prefix cache."""

    cached_tokens: int


class Usage(_Schema):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionLogprobs(_Schema):
    """Log probabilities, one for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(_Schema):
    """One of the answers."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length", "timeout", "abort", "error"] | None


class Completion(_Schema):
    """Answer of POST /v1/completions; the events of a stream have the same fields."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class CalledFunction(_Schema):
    """Name, and arguments as JSON."""

    name: str
    arguments: str


class ToolCall(_Schema):
    """A call that the model makes."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(_Schema):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(_Schema):
    """One of the answers."""

    index: int
    message: AnswerMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls", "timeout", "abort", "error"]


class ChatCompletion(_Schema):
    """Answer of POST /v1/chat/completions; a stream is of `chat.completion.chunk`s."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Embedding(_Schema):
    """Embedding of one prompt."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str
    """Base64 of little-endian floats of 32 bits where that is asked for."""


class PromptUsage(_Schema):
    """Token counts where nothing is generated."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(_Schema):
    """Answer of POST /v1/embeddings."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: PromptUsage


class Response(BaseModel):
    """Answer of POST /v1/responses; a stream is of events with a `type`."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["in_progress", "completed", "incomplete", "cancelled", "failed"]
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None


class Message(_Schema):
    """Answer of POST /v1/messages; a stream is of events with a `type`."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None
    stop_sequence: str | None
    usage: dict[str, int]


class AnthropicError(_Schema):
    """Anthropic's shape."""

    type: Literal["error"]
    error: dict[Literal["type", "message"], str]
