"""How long requests wait and take, and how they end."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import HistogramMetricFamily

from fastserve_mega.types import FinishReason, Usage

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 10,
)  # fmt: skip
TOKENS = (
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000,
)  # fmt: skip
_SUCCESSES = (FinishReason.STOP, FinishReason.LENGTH)


_NUM_RECENT = 500
"""Requests whose latencies a snapshot shows."""


class ObservedRequest(Protocol):
    """When things happened to a request, on the coordinator's clock; None for what did not."""

    @property
    def arrived_at(self) -> float: ...
    @property
    def started_at(self) -> float | None: ...
    @property
    def first_token_at(self) -> float | None: ...
    @property
    def last_token_at(self) -> float | None: ...
    @property
    def usage(self) -> Usage: ...


class RequestMetrics:
    """Counters and histograms of requests; the plain numbers are for snapshots."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0
        self.num_finished = 0
        """Requests that were accepted, and have ended."""
        self.recent_ttft_s: deque[float] = deque(maxlen=_NUM_RECENT)
        self.recent_jct_s: deque[float] = deque(maxlen=_NUM_RECENT)
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
        self._tokens_of_step = 0
        self._gaps: dict[float, int] = {}

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"fastserve_{name}", text, registry=self._registry)

    def _seconds(self, name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
        full_name = f"fastserve_{name}_seconds"
        return Histogram(full_name, text, buckets=buckets, registry=self._registry)

    def _tokens(self, name: str, text: str) -> Histogram:
        return Histogram(f"fastserve_{name}", text, buckets=TOKENS, registry=self._registry)

    def observe_arrival(self, num_prompt_tokens: int) -> None:
        self.num_prompt_tokens += num_prompt_tokens
        self._prompt_tokens.inc(num_prompt_tokens)

    def observe_start(self, queue_s: float) -> None:
        """A request's first step is dispatched, `queue_s` after it arrived."""
        self._queue.observe(queue_s)

    def observe_token(self, request: ObservedRequest, now: float) -> None:
        """A request gets a token; its times are those before that."""
        self._tokens_of_step += 1
        if request.last_token_at is None:
            ttft_s = now - request.arrived_at
            self.recent_ttft_s.append(ttft_s)
            self._ttft.observe(ttft_s)
        else:
            gap = now - request.last_token_at
            self._gaps[gap] = self._gaps.get(gap, 0) + 1

    def end_step(self) -> None:
        """Take over the tokens that a step has brought, and the times between them."""
        self.num_generation_tokens += self._tokens_of_step
        self._generation_tokens.inc(self._tokens_of_step)
        self._tokens_of_step = 0
        for gap, count in self._gaps.items():
            self._inter_token.observe(gap, count)
        self._gaps.clear()

    def observe_rejection(self) -> None:
        """A request was not accepted, since the server is full."""
        self._finished.labels(FinishReason.REJECTED.value).inc()

    def observe_finish(self, reason: FinishReason, request: ObservedRequest, now: float) -> None:
        """A request ended, which was accepted unless it ends so."""
        if reason is FinishReason.REJECTED:
            self.observe_rejection()
            return
        self.num_finished += 1
        self._finished.labels(reason.value).inc()
        jct_s, usage = now - request.arrived_at, request.usage
        self.recent_jct_s.append(jct_s)
        self._jct.observe(jct_s)
        self._prompt_lengths.observe(usage.prompt_tokens)
        self._output_lengths.observe(usage.completion_tokens)
        if reason in _SUCCESSES:
            self._success.labels(reason.value).inc()
        if (
            request.started_at is None
            or request.first_token_at is None
            or request.last_token_at is None
        ):
            return
        self._prefill.observe(request.first_token_at - request.started_at)
        decode_s = request.last_token_at - request.first_token_at
        self._decode.observe(decode_s)
        if usage.completion_tokens > 1:
            self._tpot.observe(decode_s / (usage.completion_tokens - 1))


class BulkHistogram:
    """A histogram that takes many equal values at once.

    The requests of a batch mostly had their last token in the same step, so at the same time.
    prometheus_client's own takes 0.7 us for each value, 180 us for a batch of 256: as much as the
    scheduler takes to plan the step.
    """

    def __init__(
        self,
        name: str,
        documentation: str,
        *,
        buckets: Sequence[float],
        registry: CollectorRegistry,
    ) -> None:
        """Start at zero; `buckets` are upper bounds in ascending order, without infinity."""
        self._name = name
        self._documentation = documentation
        self._bounds = tuple(buckets)
        self._labels = [*(str(float(bound)) for bound in buckets), "+Inf"]
        self._counts = [0] * len(self._labels)
        self._sum = 0.0
        registry.register(self)

    def observe(self, value: float, count: int) -> None:
        """Add `count` observations of one value."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """For the registry."""
        cumulative = [float(count) for count in accumulate(self._counts)]
        yield HistogramMetricFamily(
            self._name,
            self._documentation,
            buckets=list(zip(self._labels, cumulative, strict=True)),
            sum_value=self._sum,
        )
