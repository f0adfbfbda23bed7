"""Where the KV is, and what moving it costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fastserve_mega.plan import CopyDirection
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
