"""OpenTelemetry: one span for each request that is answered by the model (extra `otel`)."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from opentelemetry.propagate import extract
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastserve_mega import __version__
from fastserve_mega.server.answers import Answer
from fastserve_mega.types import Timings

if TYPE_CHECKING:
    from fastserve_mega.server.protocol import GenerationRequest

_log = logging.getLogger(__name__)
_NAME = "fastserve_mega"
_LAST_SPANS_S = 5.0
"""How long the server's end may wait for a collector that takes the last spans."""
_NS = 1_000_000_000
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
"""What the conventions for generative AI call them."""
_ASKED = (
    "model", "max_tokens", "temperature", "top_p", "top_k", "frequency_penalty",
    "presence_penalty", "seed", "stream",
)  # fmt: skip


class Tracing:
    """Makes spans, and hands them to an exporter.

    Args:
        provider: of spans; shut down by `close`.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer(_NAME, __version__)

    def layer(self, app: ASGIApp) -> ASGIApp:
        """Trace what an application answers."""
        return _TraceRequests(app, self)

    def begin(self, operation: str, scope: Scope) -> Span:
        """Begin the span of a request, within the trace that its headers name, if any."""
        span: Span = self._tracer.start_span(
            operation,
            context=extract(dict(Headers(scope=scope))),
            kind=SpanKind.SERVER,
            attributes={
                "gen_ai.operation.name": operation,
                "http.request.method": scope["method"],
                "url.path": scope["path"],
            },
        )
        return span

    def close(self) -> None:
        """Export what is left, within a few seconds."""
        # The exporter goes on trying for longer than a server may take to end.
        last = threading.Thread(target=self._provider.shutdown, daemon=True)
        last.start()
        last.join(_LAST_SPANS_S)
        if last.is_alive():
            _log.warning("the last spans were not taken within %g s", _LAST_SPANS_S)


def open_tracing() -> Tracing:
    """Export spans as the environment's OTEL_* variables say.

    Raises:
        ValueError: they ask for what there is not.
    """
    # The SDK and the exporter read all other variables by themselves.
    name = os.environ.get("OTEL_SERVICE_NAME") or _NAME
    provider = TracerProvider(
        resource=Resource.create({SERVICE_NAME: name}), shutdown_on_exit=False
    )
    provider.add_span_processor(BatchSpanProcessor(_exporter()))
    return Tracing(provider)


def _exporter() -> SpanExporter:
    kind = os.environ.get("OTEL_TRACES_EXPORTER") or "otlp"
    if kind == "console":
        return ConsoleSpanExporter()
    if kind != "otlp":
        raise ValueError(f"OTEL_TRACES_EXPORTER must be otlp, console or none, got {kind!r}")
    generic = os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or generic
    if protocol not in (None, "", "http/protobuf"):
        raise ValueError(f"OTEL_EXPORTER_OTLP_PROTOCOL must be http/protobuf, got {protocol!r}")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()


class _TraceRequests:
    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asks = scope["type"] == "http" and scope["method"] == "POST"
        operation = _OPERATIONS.get(scope["path"]) if asks else None
        if operation is None:
            await self._app(scope, receive, send)
            return
        status = 500  # of what fails before it answers

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        state = scope.setdefault("state", {})
        span = self._tracing.begin(operation, scope)
        try:
            await self._app(scope, receive, watched)
        finally:
            if span.is_recording():
                _tell_status(span, status)
                if (answer := state.get("answer")) is not None:
                    _tell_request(span, operation, answer.body)
                    _tell_answer(span, answer)
            span.end()


def _tell_status(span: Span, status: int) -> None:
    span.set_attribute("http.response.status_code", status)
    if status >= 400:
        span.set_attribute("error.type", str(status))
    if status >= 500:
        span.set_status(Status(StatusCode.ERROR))


def _tell_request(span: Span, operation: str, body: GenerationRequest) -> None:
    # An embedding is asked for as a completion of no token.
    for name in ("model",) if operation == "embeddings" else _ASKED:
        if (value := getattr(body, name, None)) is not None:
            span.set_attribute(f"gen_ai.request.{name}", value)
    if body.answers_per_prompt > 1:
        span.set_attribute("gen_ai.request.choice.count", body.answers_per_prompt)
    if body.model:
        span.update_name(f"{operation} {body.model}")


def _tell_answer(span: Span, answer: Answer) -> None:
    usage, generations = answer.usage, answer.generations
    span.set_attribute("gen_ai.response.id", generations[0].request_id.rpartition("-")[0])
    span.set_attribute("gen_ai.usage.input_tokens", usage.prompt_tokens)
    span.set_attribute("gen_ai.usage.output_tokens", usage.completion_tokens)
    span.set_attribute("gen_ai.usage.cache_read.input_tokens", usage.cached_tokens)
    reasons = [answer.reason(index) for index in range(len(generations))]
    span.set_attribute("gen_ai.response.finish_reasons", reasons)
    if "error" in reasons:
        span.set_status(Status(StatusCode.ERROR))
    for index, generation in enumerate(generations):
        known = {"fastserve.answer": index} if len(generations) > 1 else {}
        span.add_event("fastserve.queued", known, answer.begun_at_ns)
        if generation.timings is None:
            continue
        for name, at_s, told in _events(generation.timings):
            at_ns = answer.begun_at_ns + int(at_s * _NS)
            span.add_event(f"fastserve.{name}", {**known, **told}, at_ns)


def _events(timings: Timings) -> Iterator[tuple[str, float, dict[str, str]]]:
    """Name, seconds from the arrival, and attributes of what happened to an answer, in order."""
    events: list[tuple[str, float, dict[str, str]]] = []
    if timings.started_s is not None:
        events.append(("prefill", timings.started_s, {}))
    if timings.first_token_s is not None:
        events.append(("first_token", timings.first_token_s, {}))
    for each in timings.interruptions:
        kv = "swapped" if each.swapped else "dropped"
        events.append(("preempted", each.at_s, {"fastserve.kv": kv}))
        events.append(("resumed", each.until_s, {"fastserve.kv": kv}))
    yield from sorted(events, key=lambda event: event[1])
