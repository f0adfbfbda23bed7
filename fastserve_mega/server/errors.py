"""Errors in OpenAI's shape, `{"error": {"message", "type", "param", "code"}}`, or Anthropic's."""

from __future__ import annotations

import logging
import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from fastserve_mega.client import (
    ClientError,
    InvalidRequestError,
    RequestIdInUseError,
    SentAgainError,
    ServerBusyError,
    ServerUnavailableError,
)
from fastserve_mega.types import SamplingParams

_log = logging.getLogger(__name__)
_RETRY_AFTER_S = 1.0
"""Where nobody knows."""
_INVALID = "invalid_request_error"
ANTHROPIC_PATH = "/v1/messages"
_ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_FIRST_WORD = re.compile("[a-z_]+")
_LONGEST_MESSAGE = 2_000
_LONGEST_PARAM = 200
"""Both may name what was sent, which may be a megabyte."""
_MOST_FORMS = 3
"""Sentences of one field that are told; a field of many forms has one for each."""


_FIELDS = {*SamplingParams.__struct_fields__, "priority", "cache_salt", "session"} - {"structured"}


class ApiError(Exception):
    """An answer other than success."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = _INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        if len(message) > _LONGEST_MESSAGE:
            message = f"{message[:_LONGEST_MESSAGE]}…"
        if param is not None and len(param) > _LONGEST_PARAM:
            param = f"{param[:_LONGEST_PARAM]}…"
        super().__init__(message)
        self.status = status
        self.headers = headers
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @property
    def anthropic_body(self) -> dict[str, Any]:
        """The error in Anthropic's shape: `{"type": "error", "error": {"type", "message"}}`."""
        other = _INVALID if self.status < 500 else "api_error"
        kind = _ANTHROPIC_KINDS.get(self.status, other)
        return {"type": "error", "error": {"type": kind, "message": str(self)}}

    def response(self, path: str) -> JSONResponse:
        """The answer to a request for a path."""
        body = self.anthropic_body if path.startswith(ANTHROPIC_PATH) else self.body
        return JSONResponse(body, self.status, self.headers)


def invalid_value(message: str) -> ApiError:
    """400 for a value out of its range; what is told of a field begins with its name."""
    name = message.partition(" ")[0]
    return ApiError(400, message, param=name if name in _FIELDS else None)


def from_client_error(error: ClientError) -> ApiError:
    """The HTTP form of what the ZeroMQ client raises."""
    message = str(error)
    if isinstance(error, RequestIdInUseError):
        return ApiError(
            422,
            "the Idempotency-Key was used for another request before",
            code="idempotency_key_reused",
        )
    if isinstance(error, SentAgainError):
        return ApiError(409, message, code="idempotency_key_in_use")
    if isinstance(error, InvalidRequestError):
        return invalid_value(message)
    if isinstance(error, ServerBusyError):
        return ApiError(
            429,
            message,
            kind="rate_limit_error",
            code="server_busy",
            headers={"Retry-After": str(math.ceil(error.retry_after_s or _RETRY_AFTER_S))},
        )
    if isinstance(error, ServerUnavailableError):
        return ApiError(503, message, kind="service_unavailable_error", code="unavailable")
    return ApiError(500, message, kind="server_error")


def add_error_handlers(app: FastAPI) -> None:
    """Give every error of the app OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return error.response(request.url.path)

    @app.exception_handler(ClientError)
    async def client_error(request: Request, error: ClientError) -> JSONResponse:
        return from_client_error(error).response(request.url.path)

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        return from_validation(error.errors(), error.body).response(request.url.path)

    @app.exception_handler(UnicodeEncodeError)
    async def no_text(request: Request, error: UnicodeEncodeError) -> JSONResponse:
        # JSON may escape half a character, which cannot be repeated.
        told = f"a text of the request is not valid Unicode: {error.reason}"
        return ApiError(400, told).response(request.url.path)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        told = _of_unreadable_body(error) or _of_route(request, error)
        return ApiError(error.status_code, told, headers=error.headers).response(request.url.path)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> JSONResponse:
        # Starlette raises it again after this answer, and uvicorn logs the traceback.
        _log.error("%s %s failed: %r", request.method, request.url.path, error)
        return ApiError(500, "the server failed; its log says why", kind="server_error").response(
            request.url.path
        )


def _of_route(request: Request, error: HTTPException) -> str:
    """What is wrong with a path or method, in more words than the status has."""
    path = request.url.path
    if error.status_code == 404:
        return f"there is no {path} here; the APIs' paths begin with /v1/, see /docs"
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return f"{path} is for {allowed}, got {request.method}"
    return str(error.detail)


def _of_unreadable_body(error: HTTPException) -> str | None:
    """What is wrong with a body that is not even text, or nested without end."""
    if isinstance(error.__cause__, UnicodeDecodeError):
        return f"the body is not valid {error.__cause__.encoding.upper()}: {error.__cause__.reason}"
    if isinstance(error.__cause__, RecursionError):
        return "the body is nested too deeply"
    if isinstance(error.__cause__, ValueError):
        return f"a number of the body has more than {sys.get_int_max_str_digits()} digits"
    return None


def from_validation(errors: Sequence[Mapping[str, Any]], body: object) -> ApiError:
    """One sentence about the first wrong field, in all the forms that it could have."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['ctx']['error']}")
    # A value with several forms has an error for each: the form that fits furthest was meant.
    meant = [error for error in errors if error["loc"][1:2] == first["loc"][1:2]]
    first = max(meant, key=lambda error: len(_path(error, body)))
    field = ".".join(_path(first, body)) or None
    if first["type"] == "value_error" and (named := _named(first)):
        return ApiError(400, _sentence(first), param=".".join((*_path(first, body), named)))
    if first["loc"] == ("body",) and first["type"] in ("model_attributes_type", "missing"):
        return ApiError(
            400, "the body must be a JSON object, sent with Content-Type: application/json"
        )
    same = [error for error in meant if _path(error, body) == _path(first, body)]
    told = "; or ".join(dict.fromkeys(map(_sentence, same[:_MOST_FORMS])))
    if first["type"] == "extra_forbidden":
        told = f"unknown field {field!r}"
    elif field is not None:
        told = told if told.startswith(f"{field} ") else f"{field}: {told}"
    return ApiError(400, told, param=field)


def _path(error: Mapping[str, Any], body: object) -> tuple[str, ...]:
    """The way to a field, without the names that pydantic gives to the forms of a union."""
    path = []
    for step in error["loc"][1:]:
        within = isinstance(body, list) and isinstance(step, int) and step < len(body)
        if within or (isinstance(body, dict) and step in body):
            body = body[step]  # type: ignore[index] # `step` fits, as was just seen
            path.append(str(step))
    if error["type"] == "missing":
        path.extend(map(str, error["loc"][-1:]))
    return tuple(path)


def _named(error: Mapping[str, Any]) -> str | None:
    """The field with whose name the sentence about an object with several begins."""
    found = _FIRST_WORD.match(_sentence(error))
    given = error["input"]
    return found[0] if found and isinstance(given, dict) and found[0] in given else None


def _sentence(error: Mapping[str, Any]) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    return message[:1].lower() + message[1:]
