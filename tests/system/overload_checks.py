"""What an overloaded server must keep to: the pure half of `overload`."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

REASONS = ("stop", "length", "abort", "timeout", "rejected")
"""How a request may end. An error, a refusal, or no end at all is a violation."""
HUNG = "hung"
FIRST_SHARE = 1 / 5
"""Share of the run after which memory must not grow any more."""
_CANCELS, _TIMES_OUT, _SHARES_PREFIX = 0.10, 0.10, 0.33
"""Shares of the requests."""
_PATIENCE_S = (0.5, 20.0)
"""Who cancels or times out waits for a time between these."""


@dataclass(frozen=True)
class Job:
    """A request to send, and how its client behaves."""

    at_s: float
    """When to send it, in seconds since the start of the run."""
    prompt: tuple[int, ...]
    max_tokens: int
    seed: int
    cancel_after_s: float | None = None
    """It is cancelled after half of its answer, or after this time if that comes first."""
    timeout_s: float | None = None


@dataclass(frozen=True)
class Outcome:
    """How a request ended."""

    reason: str
    output_tokens: int
    ended_s: float
    """Seconds since the start of the run."""


@dataclass(frozen=True)
class Blocks:
    """The blocks of a pool."""

    free: int
    cached: int
    owned: int


@dataclass(frozen=True)
class Sample:
    """What was seen at one moment."""

    at_s: float
    unfinished: int
    resident_bytes: Mapping[str, int]
    """Memory of each server process."""
    device: Blocks
    host: Blocks

    @property
    def total_bytes(self) -> int:
        """Resident memory of all server processes together."""
        return sum(self.resident_bytes.values())


@dataclass(frozen=True)
class Finding:
    """One thing that must hold."""

    what: str
    figures: str
    holds: bool


@dataclass(frozen=True)
class Workload:
    """What requests are drawn from."""

    prompts: Sequence[Sequence[int]]
    prefix: Sequence[int]
    """Common beginning of some of them."""
    answer_lengths: Sequence[int]
    """max_tokens of a request is one of these."""

    def draw(self, rng: random.Random, *, disturb: bool) -> Iterator[Job]:
        """Requests without end, all sent at once.

        Args:
            rng: they are a function of its state.
            disturb: some of them are cancelled, or have a time limit.
        """
        while True:
            prompt = rng.choice(self.prompts)
            prefix = self.prefix if rng.random() < _SHARES_PREFIX else ()
            behaviour, patience_s = rng.random(), rng.uniform(*_PATIENCE_S)
            cancels = disturb and behaviour < _CANCELS
            times_out = disturb and _CANCELS <= behaviour < _CANCELS + _TIMES_OUT
            yield Job(
                at_s=0.0,
                prompt=(*prefix, *prompt),
                max_tokens=rng.choice(self.answer_lengths),
                seed=rng.randrange(2**31),
                cancel_after_s=patience_s if cancels else None,
                timeout_s=patience_s if times_out else None,
            )


def parse_metrics(text: str) -> dict[str, float]:
    """Prometheus' text format: values by name and labels, without the `fastserve_` in front."""
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if line and line[0] != "#")
    return {name.removeprefix("fastserve_"): float(value) for name, value in lines}


def blocks_of(metrics: Mapping[str, float], pool: str) -> Blocks:
    """The blocks of the `device` or `host` pool."""
    free, cached, owned = (
        int(metrics[f'{pool}_blocks{{state="{state}"}}']) for state in ("free", "cached", "owned")
    )
    return Blocks(free, cached, owned)


def finished_requests(metrics: Mapping[str, float]) -> int:
    """Ends that the server counted, whatever the reason."""
    return int(
        sum(value for name, value in metrics.items() if name.startswith("request_finished_total"))
    )


def samples_of_run(samples: Sequence[Sample], seconds: float) -> list[Sample]:
    """Samples from a fifth of the run to its end, or the last one if it was as short as that."""
    during = [sample for sample in samples if FIRST_SHARE * seconds <= sample.at_s <= seconds]
    return during or [samples[-1]]


def memory_growth(samples: Sequence[Sample], seconds: float) -> int:
    """Bytes by which resident memory grew between a fifth of the run and its end."""
    during = samples_of_run(samples, seconds)
    return during[-1].total_bytes - during[0].total_bytes


def check(
    outcomes: Sequence[Outcome],
    samples: Sequence[Sample],
    *,
    seconds: float,
    counted_ends: int,
    processes_before: Sequence[str],
    growth_limit_bytes: int,
) -> list[Finding]:
    """All that must hold at the end.

    Args:
        outcomes: one of each request that was sent.
        samples: in the order of time; the last one was taken when all had ended.
        seconds: length of the run, without the time for the last ones to end.
        counted_ends: how many ends the server counted for these requests.
        processes_before: when the run began.
        growth_limit_bytes: see `memory_growth`.
    """
    reasons = Counter(outcome.reason for outcome in outcomes)
    wrong = {reason: count for reason, count in reasons.items() if reason not in REASONS}
    growth = memory_growth(samples, seconds)
    last = samples[-1]
    gone = sorted(set(processes_before) - set(last.resident_bytes))
    return [
        Finding("each request ended with a good reason", f"others: {wrong or 'none'}", not wrong),
        Finding(
            "the server counted one end of each",
            f"{counted_ends} ends, {len(outcomes)} requests", counted_ends == len(outcomes),
        ),
        Finding("some were rejected", str(reasons["rejected"]), reasons["rejected"] > 0),
        Finding("all processes live", f"gone: {', '.join(gone) or 'none'}", not gone),
        Finding("nothing is unfinished", f"{last.unfinished} requests", last.unfinished == 0),
        Finding("all device blocks free or cached", str(last.device), last.device.owned == 0),
        Finding("all host blocks free or cached", str(last.host), last.host.owned == 0),
        Finding(
            "memory is flat from a fifth of the run on",
            f"{growth / 2**20:+.1f} MiB, limit {growth_limit_bytes / 2**20:g} MiB",
            growth <= growth_limit_bytes,
        ),
    ]  # fmt: skip
