"""A histogram that takes many equal values at once."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily


class BulkHistogram:
    """The requests of a batch mostly had their last token in the same step, so at the same time.

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
