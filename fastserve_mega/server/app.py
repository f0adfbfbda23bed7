"""The HTTP application."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.routing import APIRoute

from fastserve_mega import __version__
from fastserve_mega.client import AsyncClient, ServerUnavailableError
from fastserve_mega.models.generation_config import NO_DEFAULTS, SamplingDefaults
from fastserve_mega.server.answers import Json
from fastserve_mega.server.api_keys import ApiKeys
from fastserve_mega.server.chat_completions import chat_router
from fastserve_mega.server.completions import completions_router
from fastserve_mega.server.conversation import Conversations, Dialect, dialect_of
from fastserve_mega.server.embeddings import embeddings_router
from fastserve_mega.server.errors import ApiError, add_error_handlers
from fastserve_mega.server.live import live_router
from fastserve_mega.server.messages.router import messages_router
from fastserve_mega.server.middleware import (
    REQUEST_ID,
    LimitBody,
    NameRequests,
    RequireKey,
    body_limit,
)
from fastserve_mega.server.openapi import ERRORS, add_docs_page
from fastserve_mega.server.responses.router import ResponseStore, responses_router
from fastserve_mega.server.service import Service
from fastserve_mega.server.tokens import tokens_router
from fastserve_mega.system.config import ReasoningParserName, ToolParserName
from fastserve_mega.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from fastserve_mega.server.tracing import Tracing

_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


def create_app(
    client: AsyncClient,
    tokenizer: Tokenizer,
    *,
    health_timeout_s: float = 2.0,
    live_view: bool = True,
    api_keys: ApiKeys | None = None,
    cors_origins: Sequence[str] = (),
    stopping: Callable[[], bool] = lambda: False,
    tool_parser: ToolParserName = "auto",
    reasoning_parser: ReasoningParserName = "auto",
    sampling_defaults: SamplingDefaults = NO_DEFAULTS,
    max_body_bytes: int = body_limit(0),
    tracing: Tracing | None = None,
) -> FastAPI:
    """The OpenAI-compatible API in front of a coordinator.

    Args:
        client: closed by the app when it shuts down.
        tokenizer: the served model's; give the client the same one.
        health_timeout_s: longest wait of GET /health for the coordinator.
        live_view: serve the page that shows what the scheduler is doing.
        api_keys: a client must have one of them; None asks for none.
        cors_origins: web pages of these origins may ask from a browser.
        stopping: whether the server is about to end.
        tool_parser: how the model writes tool calls.
        reasoning_parser: how it marks what it thinks before it answers.
        sampling_defaults: stand for the values that a request does not give.
        max_body_bytes: a longer body is refused; see `body_limit`.
        tracing: makes a span of each request that is answered; closed by the app.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await service.aclose()
            if tracing is not None:
                await asyncio.to_thread(tracing.close)

    service = Service(client, tokenizer, sampling_defaults)
    app = FastAPI(
        title="fastserve_mega",
        version=__version__,
        lifespan=lifespan,
        responses=ERRORS,
        docs_url=None,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
    )
    app.add_middleware(LimitBody, limit=max_body_bytes)
    if api_keys is not None:
        app.add_middleware(RequireKey, keys=api_keys)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID, "Retry-After"],  # which the official clients read
        )
    app.add_middleware(NameRequests)
    if tracing is not None:
        app.add_middleware(tracing.layer)  # the last one is the outermost
    add_error_handlers(app)
    _add_generation_routes(app, service, dialect_of(tokenizer, tool_parser, reasoning_parser))
    _add_model_routes(app, service)
    _add_operator_routes(app, service, health_timeout_s, api_keys)
    add_docs_page(app)
    _answer_head(app)
    if live_view:
        app.include_router(live_router(client, stopping))
    return app


def _answer_head(app: FastAPI) -> None:
    """Answer HEAD where GET is answered: load balancers probe with it."""
    for route in list(app.routes):
        if isinstance(route, APIRoute) and "GET" in (route.methods or ()):
            app.add_api_route(route.path, route.endpoint, methods=["HEAD"], include_in_schema=False)


def _add_generation_routes(app: FastAPI, service: Service, dialect: Dialect) -> None:
    conversations = Conversations(service, dialect)
    app.include_router(completions_router(service))
    app.include_router(embeddings_router(service))
    app.include_router(chat_router(conversations))
    app.include_router(responses_router(conversations, ResponseStore()))
    app.include_router(messages_router(conversations))
    app.include_router(tokens_router(conversations))


def _add_model_routes(app: FastAPI, service: Service) -> None:
    created = int(time.time())

    async def model() -> Json:
        info = await service.client.info()
        return {
            "id": info.model_name,
            "object": "model",
            "created": created,
            "owned_by": "fastserve_mega",
            "max_model_len": info.max_context,
        }

    @app.get("/v1/models/", include_in_schema=False)
    @app.get("/v1/models")
    async def list_models() -> Json:
        return {"object": "list", "data": [await model()]}

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> Json:
        await service.check_model(name)
        return await model()


def _add_operator_routes(
    app: FastAPI, service: Service, health_timeout_s: float, api_keys: ApiKeys | None
) -> None:
    @app.get("/health/live")
    async def live() -> Json:
        """Say that this process answers, whatever is behind it."""
        return {"status": "ok"}

    @app.get("/health/ready")
    @app.get("/health")
    async def health() -> Json:
        """Say that requests would be answered: the coordinator answers."""
        try:
            await service.client.ping(health_timeout_s)
        except ServerUnavailableError as error:
            raise ApiError(
                503, str(error), kind="service_unavailable_error", code="unavailable"
            ) from None
        return {"status": "ok"}

    @app.get("/version")
    async def version() -> Json:
        return {"version": __version__}

    @app.get("/metrics")
    async def metrics() -> Response:
        of_keys = "" if api_keys is None else api_keys.render()
        return Response(await service.client.metrics() + of_keys, media_type=_PROMETHEUS)
