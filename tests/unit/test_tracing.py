"""Spans of requests, as an exporter gets them."""

from __future__ import annotations

import queue

import httpx
import pytest
from fake_coordinator import start_fake_coordinator
from http_server import serving

from fastserve_mega.client.testing import WAIT_S, answer
from fastserve_mega.messaging.messages import Finished
from fastserve_mega.server.api_server import _tracing
from fastserve_mega.text.tokenizer import Tokenizer
from fastserve_mega.types import FinishReason, Interruption, Timings, Usage

pytest.importorskip("opentelemetry.sdk", reason="needs pip install '.[otel]'")

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult

from fastserve_mega.server.tracing import Tracing

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TIMINGS = Timings(0.9, 0.1, 0.25, (Interruption(0.3, 0.4, True), Interruption(0.5, 0.7, False)))


class Spans(SpanExporter):
    """Keeps spans; one ends a moment after its answer has arrived."""

    def __init__(self):
        self.ended = queue.Queue()

    def export(self, spans):
        for span in spans:
            self.ended.put(span)
        return SpanExportResult.SUCCESS


@pytest.fixture(scope="module")
def shared(tiny_tokenizer_dir):
    coordinator = start_fake_coordinator()
    exporter = Spans()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing = Tracing(provider)
    with (
        serving(coordinator, Tokenizer(tiny_tokenizer_dir), tracing=tracing) as url,
        httpx.Client(base_url=url, timeout=WAIT_S) as http,
    ):
        yield coordinator, exporter, http
    coordinator.close()


@pytest.fixture
def ask(shared):
    """Asks, and returns the span."""
    coordinator, exporter, http = shared
    coordinator.reset()
    coordinator.behaviour = timed

    def send(path, body, headers=None):
        http.post(path, json=body, headers=headers)
        return exporter.ended.get(timeout=WAIT_S)

    return send


def timed(submit):
    """Four tokens, and what a coordinator would tell of them."""
    yield from list(answer([5, 6, 7, 8])(submit))[:-1]
    usage = Usage(len(submit.prompt), 4, 1)
    yield Finished(submit.request_id, FinishReason.LENGTH, usage, timings=TIMINGS)


def test_a_span_tells_what_was_asked_and_what_was_answered(ask):
    body = {"prompt": [1, 2, 3], "model": "tiny", "max_tokens": 4, "temperature": 0.5}
    span = ask("/v1/completions", body)
    assert span.name == "text_completion tiny"
    assert span.kind.name == "SERVER"
    assert span.parent is None
    told = dict(span.attributes)
    assert told.pop("gen_ai.response.id").startswith("cmpl-")
    assert told == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.usage.cache_read.input_tokens": 1,
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "url.path": "/v1/completions",
    }


def test_events_are_at_the_times_that_the_coordinator_tells(ask):
    span = ask("/v1/completions", {"prompt": [1], "stream": True})
    begun = span.events[0].timestamp
    assert span.start_time <= begun <= span.end_time
    told = [
        (event.name.removeprefix("fastserve."), round((event.timestamp - begun) / 1e9, 6))
        for event in span.events
    ]
    assert told == [
        ("queued", 0.0), ("prefill", 0.1), ("first_token", 0.25), ("preempted", 0.3),
        ("resumed", 0.4), ("preempted", 0.5), ("resumed", 0.7),
    ]  # fmt: skip
    kv = [event.attributes["fastserve.kv"] for event in span.events[3:]]
    assert kv == ["swapped", "swapped", "dropped", "dropped"]


def test_a_span_goes_on_with_the_callers_trace(ask):
    messages = [{"role": "user", "content": "hi"}]
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    span = ask("/v1/chat/completions", {"messages": messages, "n": 2}, headers)
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == PARENT
    assert span.attributes["gen_ai.request.choice.count"] == 2
    assert [e.attributes["fastserve.answer"] for e in span.events] == [0] * 7 + [1] * 7


def test_what_the_caller_does_not_sample_and_what_is_not_generated_has_no_span(shared, ask):
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
    shared[2].post("/v1/completions", json={"prompt": [1]}, headers=headers)
    shared[2].post("/tokenize", json={"prompt": "x"})
    shared[2].get("/health")
    assert ask("/v1/embeddings", {"input": [1]}).name == "embeddings"


def test_a_refused_request_has_its_status(ask):
    span = ask("/v1/embeddings", {"input": []})
    assert span.name == "embeddings"
    assert span.attributes["http.response.status_code"] == 400
    assert span.attributes["error.type"] == "400"
    assert span.status.is_unset
    assert span.events == ()


def test_an_error_of_the_server_is_one_of_the_span(shared, ask):
    shared[0].behaviour = lambda submit: [
        Finished(submit.request_id, FinishReason.ERROR, Usage(1, 0), "the ranks were lost")
    ]
    span = ask("/v1/completions", {"prompt": [1]})
    assert span.attributes["http.response.status_code"] == 500
    assert span.status.status_code.name == "ERROR"


@pytest.mark.parametrize(
    ("environment", "on"),
    [
        ({}, False),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}, False),
        ({"OTEL_TRACES_EXPORTER": "console"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:9"}, True),
    ],
)
def test_the_environment_says_whether_there_are_spans(monkeypatch, environment, on):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    tracing = _tracing()
    assert (tracing is not None) is on
    if tracing is not None:
        tracing.close()


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin", "must be otlp, console or none, got 'zipkin'"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "must be http/protobuf, got 'grpc'"),
    ],
)
def test_what_there_is_not_is_refused(monkeypatch, name, value, sentence):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=sentence):
        _tracing()
