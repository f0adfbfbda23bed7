"""The OpenAPI document, and the page that shows it without anything from elsewhere."""

from __future__ import annotations

import importlib.util
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel

from fastserve_mega.server.errors import ApiError
from fastserve_mega.server.schemas import AnthropicError, Error

Documented = dict[int | str, dict[str, Any]]
_PAGE = "/docs"
_ASSETS = "fastapi_swagger"
"""Package of Swagger UI; nothing but its files is used."""
_EVENTS = {"text/event-stream": {"schema": {"type": "string"}}}
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
