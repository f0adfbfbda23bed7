"""Options that several commands have, and how their values are read."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from fastserve_mega.slo import Slo, parse_slo
from fastserve_mega.system.config import SchedulerConfig

Number = TypeVar("Number", int, float)


def positive(kind: type[Number]) -> Callable[[str], Number]:
    """Return what parses a positive number of a kind."""

    def parse(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            value = kind(0)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
        return value

    return parse


def positive_list(kind: type[Number]) -> Callable[[str], tuple[Number, ...]]:
    """Return what parses positive numbers of a kind, separated by commas."""
    one = positive(kind)
    return lambda text: tuple(one(word) for word in text.split(","))


def policy_names(text: str) -> tuple[str, ...]:
    """Parse policies separated by commas."""
    names = tuple(text.split(","))
    for name in names:
        try:
            SchedulerConfig(policy=name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return names


def add_rank_options(parser: argparse.ArgumentParser) -> None:
    """Add what a rank passes on to the coordinator it starts."""
    parser.add_argument(
        "--supervisor",
        type=int,
        metavar="PID",
        help="process that starts the ranks again when one is lost: leave requests unfinished "
        "then, and end with it",
    )
    parser.add_argument(
        "--epoch", metavar="NAME", help="what clients know this start by; drawn by default"
    )
    parser.add_argument(
        "--profile-to",
        type=Path,
        metavar="FILE",
        help="measure step times, write them here and end; what `profile` starts",
    )


def add_runner(parser: argparse.ArgumentParser) -> None:
    """Add the choice of what computes tokens."""
    parser.add_argument(
        "--runner",
        choices=("megatron", "fake"),
        default="megatron",
        help="what computes tokens; 'fake' needs no weights and is for tests",
    )


def add_slo(parser: argparse.ArgumentParser) -> None:
    """Let a command be told what is promised to users."""
    default = Slo()
    parser.add_argument(
        "--slo",
        type=_slo,
        default=default,
        metavar="TTFT,TPOT",
        help="longest time to first token and mean time per output token of a good answer, in "
        f"seconds; default: {default.ttft_s:g},{default.tpot_s:g}",
    )


def _slo(text: str) -> Slo:
    try:
        return parse_slo(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
