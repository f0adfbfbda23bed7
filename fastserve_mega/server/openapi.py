"""The OpenAPI document, and the page that shows it without anything from elsewhere.

Nothing is computed with the answers that are described here; tests/unit/test_openapi.py holds real
ones to them.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict

from fastserve_mega.server.errors import ApiError

Documented = dict[int | str, dict[str, Any]]
_PAGE = "/docs"
_ASSETS = "fastapi_swagger"
"""Package of Swagger UI; nothing but its files is used."""
_EVENTS = {"text/event-stream": {"schema": {"type": "string"}}}


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


ERRORS: Documented = {
    "4XX": {"model": Error, "description": "What is wrong, in one sentence"},
    "5XX": {"model": Error, "description": "What failed, in one sentence"},
}
"""Errors of every endpoint. That there is a 4XX keeps FastAPI from promising its own 422."""
ANTHROPIC_ERRORS: Documented = {
    status: {**told, "model": AnthropicError} for status, told in ERRORS.items()
}


def answers_with(model: type[BaseModel], errors: Documented = ERRORS) -> Documented:
    """What an endpoint documents that answers with JSON, or with a stream of events."""
    whole = {"model": model, "content": _EVENTS, "description": "Whole, or a stream of events"}
    return {200: whole, 400: errors["4XX"], **errors}


def add_docs_page(app: FastAPI) -> None:
    """Serve /docs with the assets of a package; without it, say what is missing."""
    if importlib.util.find_spec(_ASSETS) is None:

        @app.get(_PAGE, include_in_schema=False)
        async def no_docs() -> None:
            raise ApiError(
                404,
                "the page needs a package that is not installed on the server: pip install "
                "fastapi-swagger; the document itself is at /openapi.json",
            )

        return

    @app.get(_PAGE, include_in_schema=False)
    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title=app.title,
            swagger_js_url=f"{_PAGE}/swagger-ui-bundle.js",
            swagger_css_url=f"{_PAGE}/swagger-ui.css",
            swagger_favicon_url=f"{_PAGE}/favicon-32x32.png",
        )

    app.mount(_PAGE, StaticFiles(packages=[(_ASSETS, "resources")]))
