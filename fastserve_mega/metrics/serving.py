"""All metrics of a coordinator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fastserve_mega.metrics.requests import SECONDS, TOKENS, RequestMetrics
from fastserve_mega.plan import CopyDirection, Plan
from fastserve_mega.snapshot import PoolView, ReplicaView

COPY_DIRECTIONS = {CopyDirection.SWAP_OUT: "out", CopyDirection.SWAP_IN: "in"}
_COPY_SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)


class MemoryMetrics:
    """The pools of all replicas, read when the metrics are asked for; and the time of copies."""

    def __init__(self, registry: CollectorRegistry, block_bytes: int) -> None:
        """Start at zero; `block_bytes` is the memory of a KV block, on all ranks together."""
        self._block_bytes = block_bytes
        self.views: Sequence[ReplicaView] = ()
        """One for each replica."""
        self.copy = Histogram(
            "fastserve_copy_seconds",
            "Time of a copy of blocks, on the slowest rank",
            ["direction"],
            buckets=_COPY_SECONDS,
            registry=registry,
        )
        self.wait = Counter(
            "fastserve_copy_wait_seconds",
            "Time computation waited for copies: within a step, on the rank that samples (step); "
            "no step in flight while copies were under way (idle)",
            ["kind"],
            registry=registry,
        )
        for direction in COPY_DIRECTIONS.values():  # else a series begins with its first value
            self.copy.labels(direction)
        for kind in ("step", "idle"):
            self.wait.labels(kind)
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        device = [each.device for each in self.views]
        capacity = sum(pool.capacity for pool in device)
        yield GaugeMetricFamily(
            "fastserve_kv_cache_usage_perc",
            "Share of the device's KV blocks that unfinished requests hold, 0 to 1",
            sum(pool.owned for pool in device) / capacity if capacity else 0.0,
        )
        yield _blocks("fastserve_device_blocks", "KV blocks on the device", device)
        host = [each.host for each in self.views]
        yield _blocks("fastserve_host_blocks", "KV blocks in host memory", host)
        yield CounterMetricFamily(
            "fastserve_preemptions",
            "Times a request lost its device blocks",
            sum(each.preemptions for each in self.views),
        )
        yield CounterMetricFamily(
            "fastserve_recomputed_tokens",
            "Tokens whose KV was lost after it was computed",
            sum(each.recomputed_tokens for each in self.views),
        )
        yield CounterMetricFamily(
            "fastserve_prefix_cache_queried_tokens",
            "Tokens of requests that were given memory",
            sum(each.prefix_queried_tokens for each in self.views),
        )
        yield CounterMetricFamily(
            "fastserve_prefix_cache_hit_tokens",
            "Those of them whose KV existed",
            sum(each.prefix_hit_tokens for each in self.views),
        )
        yield self._swapped(
            "fastserve_swap_blocks",
            "KV blocks copied between device and host, write-through included",
            1,
        )
        yield self._swapped(
            "fastserve_swap_bytes",
            "Bytes of these blocks, all ranks together",
            self._block_bytes,
        )

    def _swapped(self, name: str, text: str, size: int) -> CounterMetricFamily:
        """The blocks that were copied, times `size`."""
        family = CounterMetricFamily(name, text, labels=["direction"])
        family.add_metric(["out"], size * sum(each.swapped_out_blocks for each in self.views))
        family.add_metric(["in"], size * sum(each.swapped_in_blocks for each in self.views))
        return family


def _blocks(name: str, text: str, pools: Sequence[PoolView]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=["state"])
    cached, owned = sum(pool.cached for pool in pools), sum(pool.owned for pool in pools)
    family.add_metric(["free"], sum(pool.capacity for pool in pools) - owned - cached)
    family.add_metric(["cached"], cached)
    family.add_metric(["owned"], owned)
    return family


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
