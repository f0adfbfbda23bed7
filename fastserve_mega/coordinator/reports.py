"""The metrics and snapshots of a server; they cost more to make than to ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastserve_mega.coordinator.replica import Replica
from fastserve_mega.messaging.frames import encode
from fastserve_mega.messaging.messages import Message, Metrics, Snapshot
from fastserve_mega.metrics import ServingMetrics
from fastserve_mega.snapshot import Percentiles

_INTERVAL_S = 0.25
_MOST_NEW = 4
"""Made in an interval whoever asks; after that those that have been made are given again."""
_MAX_VIEWS = 1_000
"""Requests of each replica that a snapshot shows, whatever is asked for."""


class Reports:
    """The metrics and snapshots of a server, as frames that are at most 0.25 s older than `now`."""

    def __init__(self, replicas: Sequence[Replica], metrics: ServingMetrics) -> None:
        self._replicas = replicas
        self._metrics = metrics
        self._frames: dict[str, bytes] = {}
        self._began = 0.0
        self._num_new = 0

    def metrics(self, now: float) -> bytes:
        return self._recent("metrics", lambda: Metrics(self._metrics.render()), now)

    def snapshot(self, max_requests: int, now: float) -> bytes:
        views = min(max_requests, _MAX_VIEWS)
        return self._recent(f"snapshot {views}", lambda: self._snapshot(views, now), now)

    def _recent(self, question: str, make: Callable[[], Message], now: float) -> bytes:
        if now - self._began >= _INTERVAL_S:
            self._began, self._num_new = now, 0
            self._frames.clear()
        if self._num_new < _MOST_NEW or question not in self._frames:
            self._num_new += 1
            self._frames[question] = encode(make())
        return self._frames[question]

    def _snapshot(self, max_requests: int, now: float) -> Snapshot:
        requests = self._metrics.requests
        return Snapshot(
            clock_s=now,
            replicas=tuple(each.scheduler.view(now, max_requests) for each in self._replicas),
            prompt_tokens=requests.num_prompt_tokens,
            generation_tokens=requests.num_generation_tokens,
            finished_requests=requests.num_finished,
            ttft_s=Percentiles.of(requests.recent_ttft_s),
            jct_s=Percentiles.of(requests.recent_jct_s),
            policy=self._metrics.info.get("policy", ""),
        )
