"""The state of the schedulers over the time of a simulated run."""

from __future__ import annotations

from collections.abc import Sequence

from fastserve_mega.scheduling.scheduler import Scheduler
from fastserve_mega.simulator.records import TimelinePoint


class Timeline:
    """Points of one run, of all replicas together."""

    def __init__(self, schedulers: Sequence[Scheduler], interval_s: float | None) -> None:
        """Begin without points; `interval_s` is the least time between two, None records none."""
        self._schedulers = schedulers
        self._interval_s = interval_s
        self.points: list[TimelinePoint] = []

    def observe(self, batch_size: int, now: float) -> None:
        """A step was dispatched."""
        points, interval_s = self.points, self._interval_s
        if interval_s is None or (points and now < points[-1].time_s + interval_s):
            return
        levels = zip(*(each.level_lengths() for each in self._schedulers), strict=True)
        devices = [each.memory.device for each in self._schedulers]
        hosts = [each.memory.host for each in self._schedulers]
        points.append(
            TimelinePoint(
                now,
                tuple(sum(lengths) for lengths in levels),
                sum(pool.capacity - pool.free_count for pool in devices),
                sum(pool.capacity - pool.free_count for pool in hosts),
                batch_size,
            )
        )
