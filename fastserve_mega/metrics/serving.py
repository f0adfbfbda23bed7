"""All metrics of a coordinator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from fastserve_mega.metrics.memory import COPY_DIRECTIONS, MemoryMetrics
from fastserve_mega.metrics.requests import SECONDS, TOKENS, RequestMetrics
from fastserve_mega.plan import CopyDirection, Plan
from fastserve_mega.snapshot import ReplicaView

_BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_PLACES = (
    ("waiting", "Requests without KV: not begun, or to be computed again"),
    ("running", "Requests with their KV on the device"),
    ("swapped", "Requests with their KV in host memory only"),
)


class ObservedScheduler(Protocol):
    """What is read from a scheduler when the metrics are asked for."""

    def view(self, now: float, max_requests: int) -> ReplicaView: ...
    def place_lengths(self) -> tuple[int, int, int]: ...


class ServingMetrics:
    """One registry of its own, so that several can live in one process (tests)."""

    def __init__(self, *, block_bytes: int, info: Mapping[str, str] | None = None) -> None:
        """Start at zero.

        Args:
            block_bytes: memory of a KV block, on all ranks together.
            info: labels of fastserve_info, by which dashboards know what is served.
        """
        registry = self._registry = CollectorRegistry()
        self.requests = RequestMetrics(registry)
        labels = self.info = dict(info or {})
        served = Gauge("fastserve_info", "1; its labels say what is served", list(labels),
                       registry=registry)  # fmt: skip
        (served.labels(**labels) if labels else served).set(1)
        self._step = Histogram(
            "fastserve_step_seconds",
            "From dispatch of a step to its result",
            buckets=SECONDS,
            registry=registry,
        )
        self._batch = Histogram(
            "fastserve_batch_size", "Requests in a step", buckets=_BATCH, registry=registry
        )
        self._step_tokens = Histogram(
            "fastserve_iteration_tokens_total", "Tokens in a step", buckets=TOKENS,
            registry=registry,
        )  # fmt: skip
        self._memory = MemoryMetrics(registry, block_bytes)
        self._schedulers: Sequence[ObservedScheduler] = ()
        registry.register(self)

    def observe_step(self, plan: Plan, elapsed_s: float, copy_wait_s: float) -> None:
        """A step has returned, and all its tokens have been observed."""
        self.requests.end_step()
        self._step.observe(elapsed_s)
        self._batch.observe(len(plan.batch))
        self._step_tokens.observe(plan.num_tokens)
        self._memory.wait.labels("step").inc(copy_wait_s)

    def observe_copy(self, direction: CopyDirection, copy_s: float) -> None:
        """All ranks have finished a copy, the slowest in `copy_s`."""
        self._memory.copy.labels(COPY_DIRECTIONS[direction]).observe(copy_s)

    def observe_stall(self, stall_s: float) -> None:
        """Nothing was computed for `stall_s`, since copies were under way."""
        self._memory.wait.labels("idle").inc(stall_s)

    def watch_schedulers(self, schedulers: Sequence[ObservedScheduler]) -> None:
        """Read the queues and pools of all replicas whenever the metrics are asked for."""
        self._schedulers = schedulers

    def render(self) -> str:
        """Prometheus exposition text."""
        self._memory.views = [scheduler.view(0.0, 0) for scheduler in self._schedulers]
        return generate_latest(self._registry).decode()

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        levels = [view.levels for view in self._memory.views]
        by_level = GaugeMetricFamily(
            "fastserve_level_requests", "Unfinished requests by level", labels=["level"]
        )
        for level, requests in enumerate(zip(*levels, strict=True)):
            by_level.add_metric([str(level)], sum(requests))
        yield by_level
        by_replica = GaugeMetricFamily(
            "fastserve_replica_requests", "Unfinished requests by replica", labels=["replica"]
        )
        for replica, lengths in enumerate(levels):
            by_replica.add_metric([str(replica)], sum(lengths))
        yield by_replica
        places = [scheduler.place_lengths() for scheduler in self._schedulers]
        for place, (name, text) in enumerate(_PLACES):
            count = sum(lengths[place] for lengths in places)
            yield GaugeMetricFamily(f"fastserve_num_requests_{name}", text, count)
        in_flight = sum(view.steps_in_flight for view in self._memory.views)
        yield GaugeMetricFamily("fastserve_steps_in_flight", "Steps in flight", in_flight)
