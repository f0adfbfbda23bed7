"""Where the KV is, and what moving it costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

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
    def preemptions(self) -> int: ...
    @property
    def recomputed_tokens(self) -> int: ...
    @property
    def copies(self) -> _Copies: ...
    @property
    def prefix_cache(self) -> _PrefixCache: ...


class MemoryMetrics:
    """Gauges and counters of the pools of all replicas."""

    def __init__(self, registry: CollectorRegistry, block_bytes: int) -> None:
        """Start at zero; `block_bytes` is the memory of a KV block, on all ranks together."""
        self._block_bytes = block_bytes
        self._usage = Gauge(
            "fastserve_kv_cache_usage_perc",
            "Share of the device's KV blocks that unfinished requests hold, 0 to 1",
            registry=registry,
        )
        self._device = Gauge(
            "fastserve_device_blocks", "KV blocks on the device", ["state"], registry=registry
        )
        self._host = Gauge(
            "fastserve_host_blocks", "KV blocks in host memory", ["state"], registry=registry
        )
        self._preemptions = Counter(
            "fastserve_preemptions", "Times a request lost its device blocks", registry=registry
        )
        self._recomputed = Counter(
            "fastserve_recomputed_tokens",
            "Tokens whose KV was lost after it was computed",
            registry=registry,
        )
        self._queried = Counter(
            "fastserve_prefix_cache_queried_tokens",
            "Tokens of requests that were given memory",
            registry=registry,
        )
        self._hit = Counter(
            "fastserve_prefix_cache_hit_tokens",
            "Those of them whose KV existed",
            registry=registry,
        )
        self._swapped_blocks = Counter(
            "fastserve_swap_blocks",
            "KV blocks copied between device and host, write-through included",
            ["direction"],
            registry=registry,
        )
        self._swapped_bytes = Counter(
            "fastserve_swap_bytes",
            "Bytes of these blocks, all ranks together",
            ["direction"],
            registry=registry,
        )
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
        self._read_before: dict[Counter, int] = {}

    def read(self, memories: Sequence[ObservedMemory]) -> None:
        """Take over the sums of all replicas."""
        device, host = [each.device for each in memories], [each.host for each in memories]
        for gauge, pools in ((self._device, device), (self._host, host)):
            gauge.labels("free").set(sum(pool.free_count - pool.kept_count for pool in pools))
            gauge.labels("cached").set(sum(pool.kept_count for pool in pools))
            gauge.labels("owned").set(sum(pool.capacity - pool.free_count for pool in pools))
        capacity = sum(pool.capacity for pool in device)
        free = sum(pool.free_count for pool in device)
        self._usage.set(1 - free / capacity if capacity else 0.0)
        self._advance(self._preemptions, sum(each.preemptions for each in memories))
        self._advance(self._recomputed, sum(each.recomputed_tokens for each in memories))
        self._advance(self._queried, sum(each.prefix_cache.queried_tokens for each in memories))
        self._advance(self._hit, sum(each.prefix_cache.hit_tokens for each in memories))
        for direction, blocks in (
            ("out", sum(each.copies.swapped_out_blocks for each in memories)),
            ("in", sum(each.copies.swapped_in_blocks for each in memories)),
        ):
            self._advance(self._swapped_blocks.labels(direction), blocks)
            self._advance(self._swapped_bytes.labels(direction), blocks * self._block_bytes)

    def _advance(self, counter: Counter, total: int) -> None:
        counter.inc(total - self._read_before.get(counter, 0))
        self._read_before[counter] = total
