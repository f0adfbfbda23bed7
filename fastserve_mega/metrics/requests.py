"""How long requests wait and take, and how they end."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram

from fastserve_mega.metrics.bulk_histogram import BulkHistogram
from fastserve_mega.types import FinishReason, Usage

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 10,
)  # fmt: skip
TOKENS = (
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000,
)  # fmt: skip
_SUCCESSES = (FinishReason.STOP, FinishReason.LENGTH)


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """When things happened to a request, on the coordinator's clock; None for what did not."""

    arrived: float
    started: float | None
    """Its first step was dispatched."""
    first_token: float | None
    last_token: float | None
    ended: float


class RequestMetrics:
    """Counters and histograms of requests."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens accepted")
        self._generation_tokens = self._counter("generation_tokens", "Output tokens generated")
        self._finished = Counter(
            "fastserve_request_finished", "Requests ended, by reason", ["finish_reason"],
            registry=registry,
        )  # fmt: skip
        self._success = Counter(
            "fastserve_request_success", "Requests that came to their own end", ["finished_reason"],
            registry=registry,
        )  # fmt: skip
        self._ttft = self._seconds("time_to_first_token", "From arrival to the first token")
        self._inter_token = BulkHistogram(
            "fastserve_inter_token_latency_seconds",
            "From a token of a request to the next",
            buckets=_TOKEN_SECONDS,
            registry=registry,
        )
        self._tpot = self._seconds(
            "request_time_per_output_token",
            "Mean time of a token after the first, of a request",
            _TOKEN_SECONDS,
        )
        self._jct = self._seconds("e2e_request_latency", "From arrival to the end")
        self._queue = self._seconds("request_queue_time", "From arrival to the first step")
        self._prefill = self._seconds("request_prefill_time", "From first step to first token")
        self._decode = self._seconds("request_decode_time", "From first token to last token")
        self._prompt_lengths = self._tokens("request_prompt_tokens", "Prompt tokens of a request")
        self._output_lengths = self._tokens(
            "request_generation_tokens", "Output tokens of a request"
        )
        for reason in FinishReason:  # else a series begins with its first value
            self._finished.labels(reason.value)
        for reason in _SUCCESSES:
            self._success.labels(reason.value)
        self._gaps: dict[float, int] = {}

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"fastserve_{name}", text, registry=self._registry)

    def _seconds(self, name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
        full_name = f"fastserve_{name}_seconds"
        return Histogram(full_name, text, buckets=buckets, registry=self._registry)

    def _tokens(self, name: str, text: str) -> Histogram:
        return Histogram(f"fastserve_{name}", text, buckets=TOKENS, registry=self._registry)

    def observe_arrival(self, prompt_tokens: int) -> None:
        self._prompt_tokens.inc(prompt_tokens)

    def observe_start(self, queue_s: float) -> None:
        """Its first step is dispatched."""
        self._queue.observe(queue_s)

    def observe_token(self, arrived: float, last_token: float | None, now: float) -> None:
        """A request has a token, and had its last one at `last_token`."""
        self._generation_tokens.inc()
        if last_token is None:
            self._ttft.observe(now - arrived)
        else:
            gap = now - last_token
            self._gaps[gap] = self._gaps.get(gap, 0) + 1

    def end_step(self) -> None:
        """Take over the times between tokens that a step has brought."""
        for gap, count in self._gaps.items():
            self._inter_token.observe(gap, count)
        self._gaps.clear()

    def observe_finish(
        self, reason: FinishReason, times: RequestTimes | None, usage: Usage
    ) -> None:
        """A request ended; `times` is None for one that was never accepted."""
        self._finished.labels(reason.value).inc()
        if times is None:
            return
        self._jct.observe(times.ended - times.arrived)
        self._prompt_lengths.observe(usage.prompt_tokens)
        self._output_lengths.observe(usage.completion_tokens)
        if reason in _SUCCESSES:
            self._success.labels(reason.value).inc()
        if times.started is None or times.first_token is None or times.last_token is None:
            return
        self._prefill.observe(times.first_token - times.started)
        decode_s = times.last_token - times.first_token
        self._decode.observe(decode_s)
        if usage.completion_tokens > 1:
            self._tpot.observe(decode_s / (usage.completion_tokens - 1))
