"""What a serving benchmark measured, summarized. Pure functions of its records."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

from fastserve_mega.slo import PAPER_SLOS, Slo

PERCENTILES = (50, 95, 99)
SLOWEST_SHARE = 0.1


@dataclass(frozen=True)
class Record:
    """One request as its sender saw it. Times are in seconds."""

    index: int
    prompt_tokens: int
    output_tokens: int
    """Counted by the server; the requested number when the request failed."""
    sent_s: float
    """Since the start of the run."""
    ttft_s: float = math.nan
    """Time to first token: from sending to the first piece of the answer."""
    jct_s: float = math.nan
    """Job completion time: from sending to the end of the answer."""
    largest_gap_s: float = math.nan
    """Longest time between two pieces of the answer that follow each other; 0 for a single one."""
    lateness_s: float = math.nan
    """The most by which a token came after sending and the SLO's TPOT for each token before it."""
    error: str | None = None

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for an answer of one token."""
        if self.output_tokens < 2:
            return None
        return (self.jct_s - self.ttft_s) / (self.output_tokens - 1)

    @property
    def normalized_s(self) -> float:
        """End-to-end latency per output token."""
        return self.jct_s / self.output_tokens


METRICS: dict[str, Callable[[Record], float | None]] = {
    "ttft_s": lambda record: record.ttft_s,
    "tpot_s": lambda record: record.tpot_s,
    "jct_s": lambda record: record.jct_s,
    "largest_gap_s": lambda record: record.largest_gap_s,
    "normalized_latency_s": lambda record: record.normalized_s,
}


def percentile(values: Sequence[float], percent: float) -> float:
    """Percentile with linear interpolation between the two nearest values.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def distribution(values: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles; empty when there are no values."""
    if not values:
        return {}
    return {"mean": fmean(values)} | {f"p{p}": percentile(values, p) for p in PERCENTILES}


def summarize(records: Sequence[Record], slo: Slo | None = None) -> dict[str, Any]:
    """Latencies of all, short and long requests, throughput, promises kept, and errors.

    Long are the requests with more tokens (prompt and answer) than the median request. When all
    are of one length, nothing is long and only `all` is told. Shares of promises kept are of all
    requests: one that failed is not good. `slo` is the one the records were made with; None takes
    the default.
    """
    done = [record for record in records if record.error is None]
    errors = Counter(record.error for record in records if record.error is not None)
    summary: dict[str, Any] = {
        "requests": len(records),
        "completed": len(done),
        "errors": dict(errors.most_common()),
    }
    if not done:
        return summary
    duration = max(r.sent_s + r.jct_s for r in done) - min(r.sent_s for r in done)
    output_tokens = sum(record.output_tokens for record in done)
    summary["duration_s"] = duration
    summary["requests_per_s"] = len(done) / duration
    summary["output_tokens"] = output_tokens
    summary["output_tokens_per_s"] = output_tokens / duration
    border = median(record.prompt_tokens + record.output_tokens for record in done)
    long = [record for record in done if record.prompt_tokens + record.output_tokens > border]
    summary["latency"] = {"all": _latencies(done)}
    if long:
        short = [record for record in done if record not in long]
        summary["latency"] |= {"short": _latencies(short), "long": _latencies(long)}
    summary |= _promises(done, len(records), slo or Slo())
    summary["slowest_long"] = slowest(long or done)
    return summary


def _promises(done: Sequence[Record], requests: int, slo: Slo) -> dict[str, Any]:
    """Shares of the requests whose users had what was promised to them."""

    def share(within: Slo) -> float:
        return sum(within.is_met(each.ttft_s, each.tpot_s or 0.0) for each in done) / requests

    return {
        "slo": asdict(slo),
        "goodput": share(slo),
        "paper_goodputs": [share(each) for each in PAPER_SLOS],
        "play": sum(slo.is_played(each.lateness_s) for each in done) / requests,
        "max_gap_s": max(each.largest_gap_s for each in done),
    }


def slowest(records: Sequence[Record]) -> dict[str, float]:
    """Mean latencies of the tenth of the requests that took longest, at least of one."""
    count = max(1, round(len(records) * SLOWEST_SHARE))
    worst = sorted(records, key=lambda record: record.jct_s)[-count:]
    return {
        "requests": count,
        "jct_s": fmean(record.jct_s for record in worst),
        "normalized_latency_s": fmean(record.normalized_s for record in worst),
    }


def _latencies(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    return {
        name: distribution([v for record in records if (v := metric(record)) is not None])
        for name, metric in METRICS.items()
    }
