"""Prometheus metrics, fed from events and plans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fastserve_mega.plan import CopyDirection, Plan
from fastserve_mega.types import FinishReason

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_COPY_SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
_DIRECTIONS = {CopyDirection.SWAP_OUT: "out", CopyDirection.SWAP_IN: "in"}
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


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


class _Memory(Protocol):
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


class ObservedScheduler(Protocol):
    """What is read from the scheduler after each loop."""

    @property
    def memory(self) -> _Memory: ...
    @property
    def steps_in_flight(self) -> int: ...
    def level_lengths(self) -> Sequence[int]: ...


class ServingMetrics:
    """One registry of its own, so that several can live in one process (tests)."""

    def __init__(self, *, block_bytes: int) -> None:
        """Start at zero.

        Args:
            block_bytes: memory of a KV block, on all ranks together.
        """
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
        self._replica = Gauge(
            "fastserve_replica_requests",
            "Unfinished requests by replica",
            ["replica"],
            registry=registry,
        )
        self._in_flight = Gauge("fastserve_steps_in_flight", "Steps in flight", registry=registry)
        self._memory = _MemoryMetrics(registry, block_bytes)
        self._schedulers: Sequence[ObservedScheduler] = ()

    def observe_arrival(self, prompt_tokens: int) -> None:
        self._prompt_tokens.inc(prompt_tokens)

    def observe_token(self, arrived: float, first_token_at: float | None, now: float) -> None:
        self._generation_tokens.inc()
        if first_token_at is None:
            self._ttft.observe(now - arrived)

    def observe_step(self, plan: Plan, elapsed_s: float, copy_wait_s: float) -> None:
        self._step.observe(elapsed_s)
        self._batch.observe(len(plan.batch))
        self._memory.wait.labels("step").inc(copy_wait_s)

    def observe_copy(self, direction: CopyDirection, copy_s: float) -> None:
        """All ranks have finished a copy, the slowest in `copy_s`."""
        self._memory.copy.labels(_DIRECTIONS[direction]).observe(copy_s)

    def observe_stall(self, stall_s: float) -> None:
        """Nothing was computed for `stall_s`, since copies were under way."""
        self._memory.wait.labels("idle").inc(stall_s)

    def observe_finish(self, reason: FinishReason, jct_s: float | None) -> None:
        self._finished.labels(reason.value).inc()
        if jct_s is not None:
            self._jct.observe(jct_s)

    def watch_schedulers(self, schedulers: Sequence[ObservedScheduler]) -> None:
        """Read the queues and pools of all replicas whenever the metrics are asked for."""
        self._schedulers = schedulers

    def render(self) -> str:
        """Prometheus exposition text."""
        if self._schedulers:
            self._read()
        return generate_latest(self._registry).decode()

    def _read(self) -> None:
        levels = [scheduler.level_lengths() for scheduler in self._schedulers]
        for level, requests in enumerate(zip(*levels, strict=True)):
            self._queue.labels(str(level)).set(sum(requests))
        for replica, lengths in enumerate(levels):
            self._replica.labels(str(replica)).set(sum(lengths))
        self._in_flight.set(sum(each.steps_in_flight for each in self._schedulers))
        self._memory.read([scheduler.memory for scheduler in self._schedulers])


class _MemoryMetrics:
    """Where the KV is, and what moving it costs."""

    def __init__(self, registry: CollectorRegistry, block_bytes: int) -> None:
        self._block_bytes = block_bytes
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
        for direction in _DIRECTIONS.values():  # else a series begins with its first value
            self.copy.labels(direction)
        for kind in ("step", "idle"):
            self.wait.labels(kind)
        self._read_before: dict[Counter, int] = {}

    def read(self, memories: Sequence[_Memory]) -> None:
        """Take over the sums of all replicas."""
        device, host = [each.device for each in memories], [each.host for each in memories]
        for gauge, pools in ((self._device, device), (self._host, host)):
            gauge.labels("free").set(sum(pool.free_count - pool.kept_count for pool in pools))
            gauge.labels("cached").set(sum(pool.kept_count for pool in pools))
            gauge.labels("owned").set(sum(pool.capacity - pool.free_count for pool in pools))
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
