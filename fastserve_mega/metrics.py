"""Prometheus metrics, fed from events and plans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fastserve_mega.plan import Plan
from fastserve_mega.types import FinishReason

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class _Pool(Protocol):
    @property
    def free_count(self) -> int: ...
    @property
    def capacity(self) -> int: ...


class _Memory(Protocol):
    @property
    def device(self) -> _Pool: ...
    @property
    def preemptions(self) -> int: ...
    @property
    def recomputed_tokens(self) -> int: ...


class ObservedScheduler(Protocol):
    """What is read from the scheduler after each loop."""

    @property
    def memory(self) -> _Memory: ...
    @property
    def steps_in_flight(self) -> int: ...
    def level_lengths(self) -> Sequence[int]: ...


class ServingMetrics:
    """One registry of its own, so that several can live in one process (tests)."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._prompt_tokens = Counter(
            "fastserve_prompt_tokens", "Prompt tokens accepted", registry=registry
        )
        self._generation_tokens = Counter(
            "fastserve_generation_tokens", "Output tokens generated", registry=registry
        )
        self._finished = Counter(
            "fastserve_request_finished",
            "Requests ended, by reason",
            ["finish_reason"],
            registry=registry,
        )
        self._ttft = Histogram(
            "fastserve_time_to_first_token_seconds",
            "From arrival to the first token",
            buckets=_SECONDS,
            registry=registry,
        )
        self._jct = Histogram(
            "fastserve_e2e_request_latency_seconds",
            "From arrival to the end",
            buckets=_SECONDS,
            registry=registry,
        )
        self._step = Histogram(
            "fastserve_step_seconds",
            "From dispatch of a step to its result",
            buckets=_SECONDS,
            registry=registry,
        )
        self._batch = Histogram(
            "fastserve_batch_size", "Requests in a step", buckets=_BATCH, registry=registry
        )
        self._queue = Gauge(
            "fastserve_level_requests", "Unfinished requests by level", ["level"], registry=registry
        )
        self._in_flight = Gauge("fastserve_steps_in_flight", "Steps in flight", registry=registry)
        self._blocks = Gauge(
            "fastserve_device_blocks", "KV blocks on the device", ["state"], registry=registry
        )
        self._preemptions = Counter(
            "fastserve_preemptions", "Requests that lost their KV", registry=registry
        )
        self._recomputed = Counter(
            "fastserve_recomputed_tokens",
            "Tokens whose KV was lost after it was computed",
            registry=registry,
        )
        self._scheduler: ObservedScheduler | None = None
        self._read_before: dict[Counter, int] = {}

    def observe_arrival(self, prompt_tokens: int) -> None:
        self._prompt_tokens.inc(prompt_tokens)

    def observe_token(self, arrived: float, first_token_at: float | None, now: float) -> None:
        self._generation_tokens.inc()
        if first_token_at is None:
            self._ttft.observe(now - arrived)

    def observe_step(self, plan: Plan, elapsed_s: float) -> None:
        self._step.observe(elapsed_s)
        self._batch.observe(len(plan.batch))

    def observe_finish(self, reason: FinishReason, jct_s: float | None) -> None:
        self._finished.labels(reason.value).inc()
        if jct_s is not None:
            self._jct.observe(jct_s)

    def watch_scheduler(self, scheduler: ObservedScheduler) -> None:
        """Read its queues and pools whenever the metrics are asked for."""
        self._scheduler = scheduler

    def render(self) -> str:
        """Prometheus exposition text."""
        if self._scheduler:
            self._read(self._scheduler)
        return generate_latest(self._registry).decode()

    def _read(self, scheduler: ObservedScheduler) -> None:
        for level, length in enumerate(scheduler.level_lengths()):
            self._queue.labels(str(level)).set(length)
        pool = scheduler.memory.device
        self._blocks.labels("free").set(pool.free_count)
        self._blocks.labels("owned").set(pool.capacity - pool.free_count)
        self._in_flight.set(scheduler.steps_in_flight)
        self._advance(self._preemptions, scheduler.memory.preemptions)
        self._advance(self._recomputed, scheduler.memory.recomputed_tokens)

    def _advance(self, counter: Counter, total: int) -> None:
        counter.inc(total - self._read_before.get(counter, 0))
        self._read_before[counter] = total
