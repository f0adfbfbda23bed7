"""Where the KV is, and what moving it costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fastserve_mega.plan import CopyDirection

COPY_DIRECTIONS = {CopyDirection.SWAP_OUT: "out", CopyDirection.SWAP_IN: "in"}
_COPY_SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)


class _Pool(Protocol):
    @property
    def free_count(self) -> int: ...
    @property
    def kept_count(self) -> int: ...
    @property
    def capacity(self) -> int: ...


class _Copies(Protocol):
    @property
    def swapped_out_blocks(self) -> int: ...
    @property
    def swapped_in_blocks(self) -> int: ...


class _Swapper(Protocol):
    @property
    def preemptions(self) -> int: ...
    @property
    def recomputed_tokens(self) -> int: ...
    @property
    def copies(self) -> _Copies: ...


class _PrefixCache(Protocol):
    @property
    def queried_tokens(self) -> int: ...
    @property
    def hit_tokens(self) -> int: ...


class ObservedMemory(Protocol):
    @property
    def device(self) -> _Pool: ...
    @property
    def host(self) -> _Pool: ...
    @property
    def swapper(self) -> _Swapper: ...
    @property
    def prefix_cache(self) -> _PrefixCache: ...


class MemoryMetrics:
    """The pools of all replicas, read when the metrics are asked for; and the time of copies."""

    def __init__(self, registry: CollectorRegistry, block_bytes: int) -> None:
        """Start at zero; `block_bytes` is the memory of a KV block, on all ranks together."""
        self._block_bytes = block_bytes
        self.memories: Sequence[ObservedMemory] = ()
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
        device, host = (
            [each.device for each in self.memories],
            [each.host for each in self.memories],
        )
        capacity = sum(pool.capacity for pool in device)
        free = sum(pool.free_count for pool in device)
        yield GaugeMetricFamily(
            "fastserve_kv_cache_usage_perc",
            "Share of the device's KV blocks that unfinished requests hold, 0 to 1",
            1 - free / capacity if capacity else 0.0,
        )
        yield _blocks("fastserve_device_blocks", "KV blocks on the device", device)
        yield _blocks("fastserve_host_blocks", "KV blocks in host memory", host)
        yield CounterMetricFamily(
            "fastserve_preemptions",
            "Times a request lost its device blocks",
            sum(each.swapper.preemptions for each in self.memories),
        )
        yield CounterMetricFamily(
            "fastserve_recomputed_tokens",
            "Tokens whose KV was lost after it was computed",
            sum(each.swapper.recomputed_tokens for each in self.memories),
        )
        yield CounterMetricFamily(
            "fastserve_prefix_cache_queried_tokens",
            "Tokens of requests that were given memory",
            sum(each.prefix_cache.queried_tokens for each in self.memories),
        )
        yield CounterMetricFamily(
            "fastserve_prefix_cache_hit_tokens",
            "Those of them whose KV existed",
            sum(each.prefix_cache.hit_tokens for each in self.memories),
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
        copies = [each.swapper.copies for each in self.memories]
        family.add_metric(["out"], size * sum(each.swapped_out_blocks for each in copies))
        family.add_metric(["in"], size * sum(each.swapped_in_blocks for each in copies))
        return family


def _blocks(name: str, text: str, pools: Sequence[_Pool]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=["state"])
    family.add_metric(["free"], sum(pool.free_count - pool.kept_count for pool in pools))
    family.add_metric(["cached"], sum(pool.kept_count for pool in pools))
    family.add_metric(["owned"], sum(pool.capacity - pool.free_count for pool in pools))
    return family
