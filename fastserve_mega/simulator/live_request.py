"""What the workers and the client of a simulated request know; the scheduler never sees it."""

from __future__ import annotations

from fastserve_mega.simulator.workload import RequestSpec


class LiveRequest:
    """An unfinished request: how much of its answer is left, and when its tokens came."""

    __slots__ = (
        "first_token_s", "harmless_gap_s", "index", "largest_gap_s", "last_token_s", "lateness_s",
        "output_left", "replica", "spec",
    )  # fmt: skip

    def __init__(self, spec: RequestSpec, index: int) -> None:
        self.spec = spec
        self.index = index
        self.replica = 0
        self.output_left = spec.output_tokens
        self.first_token_s = -1.0
        self.last_token_s = spec.arrival_s
        self.largest_gap_s = 0.0
        self.lateness_s = 0.0
        self.harmless_gap_s = -1.0
        """No shorter gap is the largest one, nor its token later than the one before."""

    @property
    def received_tokens(self) -> int:
        """Tokens of the answer that its client has."""
        return self.spec.output_tokens - self.output_left

    def observe_gap(self, now: float, pace_s: float) -> None:
        """Note the first token, or one that came more slowly than the pace."""
        waited_s = now - self.spec.arrival_s
        if self.first_token_s < 0:
            self.first_token_s = now
            self.lateness_s = waited_s
            self.harmless_gap_s = 0.0
            return
        before = self.received_tokens - 1
        self.largest_gap_s = max(self.largest_gap_s, now - self.last_token_s)
        self.lateness_s = max(self.lateness_s, waited_s - pace_s * before)
        self.harmless_gap_s = pace_s
