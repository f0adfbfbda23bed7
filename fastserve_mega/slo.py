"""What a user feels of an answer, and what is promised of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Slo:
    """A service level objective: limits of the latencies of one answer, in seconds."""

    ttft_s: float = 1.0
    """Longest time to first token."""
    tpot_s: float = 0.1
    """Longest mean time per output token after the first: the pace of somebody who reads."""

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} of an SLO must be a positive number, got {value}")

    def is_met(self, ttft_s: float, tpot_s: float) -> bool:
        """Whether an answer was good."""
        return ttft_s <= self.ttft_s and tpot_s <= self.tpot_s

    def is_played(self, lateness_s: float) -> bool:
        """Whether no token came later than a reader wanted it.

        Args:
            lateness_s: the most by which a token came after the request's arrival and `tpot_s` for
                each token before it.
        """
        return lateness_s <= self.ttft_s

    def __str__(self) -> str:
        return f"TTFT {self.ttft_s:g} s, TPOT {self.tpot_s:g} s"


PAPER_SLOS = (Slo(1.55, 0.15), Slo(3.1, 0.3), Slo(6.2, 0.6))
"""Strict, medium and loose, as in the FastServe paper's later version."""


def parse_slo(text: str) -> Slo:
    """Read `TTFT,TPOT`, seconds each.

    Raises:
        ValueError: it is of another form, or a number is not positive.
    """
    ttft, comma, tpot = text.partition(",")
    try:
        if not comma:
            raise ValueError
        seconds = float(ttft), float(tpot)
    except ValueError:
        raise ValueError(f"not of the form TTFT,TPOT in seconds: {text!r}") from None
    return Slo(*seconds)


def largest_gap(times: Sequence[float]) -> float:
    """Return the longest time between two that follow each other; 0 for a single one."""
    return max((after - before for before, after in pairwise(times)), default=0.0)


def lateness(times: Sequence[float], sent: float, tokens: int, pace_s: float) -> float:
    """Return the most by which a token came after `sent` and the pace for each token before it.

    Args:
        times: of the pieces of an answer, which are taken to be of as many tokens each.
        sent: when the request was.
        tokens: of the answer.
        pace_s: seconds per token.
    """
    return max(
        time - sent - pace_s * (number * tokens // len(times)) for number, time in enumerate(times)
    )
