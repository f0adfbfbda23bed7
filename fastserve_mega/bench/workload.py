"""What is sent: a function of the options and the seed only."""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a prompt and its answer, and how often this pair is drawn."""

    prompt: int
    output: int
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Job:
    """A request to send."""

    index: int
    prompt: tuple[int, ...]
    output_tokens: int
    at_s: float
    """When to send it, in seconds since the start of the run."""


def parse_mix(text: str) -> tuple[Lengths, ...]:
    """`SHARE:PROMPT/OUTPUT,…`, for example `0.8:64/16,0.2:512/256`.

    Raises:
        ValueError: it is of another form, or a number is not positive.
    """
    mix = []
    for part in text.split(","):
        try:
            share, lengths = part.split(":")
            prompt, output = lengths.split("/")
            mix.append(Lengths(int(prompt), int(output), float(share)))
        except ValueError:
            raise ValueError(f"not of the form SHARE:PROMPT/OUTPUT: {part!r}") from None
    return _positive(mix, text)


def read_lengths(path: Path) -> tuple[Lengths, ...]:
    """A CSV file with the columns prompt_tokens and output_tokens.

    Raises:
        ValueError: a column is missing, or a number is not a positive integer.
        OSError: it cannot be read.
    """
    with path.open(newline="", encoding="utf-8") as file:
        try:
            rows = [
                Lengths(int(row["prompt_tokens"]), int(row["output_tokens"]))
                for row in csv.DictReader(file)
            ]
        except KeyError as error:
            raise ValueError(f"{path} has no column {error}") from None
    return _positive(rows, str(path))


def _positive(lengths: Sequence[Lengths], where: str) -> tuple[Lengths, ...]:
    if not lengths or any(min(e.prompt, e.output) < 1 or not e.share > 0 for e in lengths):
        raise ValueError(f"lengths and shares must be positive: {where}")
    return tuple(lengths)


def make_jobs(
    lengths: Sequence[Lengths],
    token_ids: range,
    requests: int,
    rate: float | None,
    *,
    seed: int,
    run: int = 0,
) -> list[Job]:
    """Draw the requests of a run.

    Args:
        lengths: one is drawn for each request.
        token_ids: of which prompts consist, so that all servers see equal lengths.
        requests: how many.
        rate: per second, Poisson arrivals; None sends all at once.
        seed: the same one draws the same requests.
        run: number of the run: the same lengths and arrivals with other tokens, else the prefix
            cache of the server would know them from the run before.
    """
    rng = random.Random(seed)
    contents = random.Random(f"{seed} {run}")
    shares = [each.share for each in lengths]
    jobs, at_s = [], 0.0
    for index, each in enumerate(rng.choices(lengths, shares, k=requests)):
        prompt = tuple(contents.choices(token_ids, k=each.prompt))
        jobs.append(Job(index, prompt, each.output, at_s))
        if rate is not None:
            at_s += rng.expovariate(rate)
    return jobs
