"""bench, simulate: how fast it is, or would be."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from fastserve_mega.commands.benchmarking import BENCH
from fastserve_mega.commands.command import DIRECTORY, FILE, Command, Group, fail, load
from fastserve_mega.system.config import PolicyName


def _simulate(options: argparse.Namespace) -> int:
    from fastserve_mega.simulator.config import load_simulation_config
    from fastserve_mega.simulator.main import run_simulate

    config = load(options, load_simulation_config)
    try:
        return run_simulate(
            config,
            data=options.data,
            policies=options.policies,
            rates=options.rates,
            json_path=options.json,
            plots=options.plots,
        )
    except (ValueError, OSError) as error:
        return fail(options, error)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := sorted(set(names) - set(get_args(PolicyName))):
        known = ", ".join(get_args(PolicyName))
        raise argparse.ArgumentTypeError(f"unknown policy {unknown[0]!r}; known are {known}")
    return names


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"not numbers separated by commas: {text!r}") from None


def _add_simulate(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument(
        "--data", type=Path, default=Path(), metavar="DIRECTORY", help="where the workload file is"
    )
    parser.add_argument(
        "--policies",
        type=_names,
        default=(),
        metavar="A,B,…",
        help="policies to compare; default: the configured one",
    )
    parser.add_argument(
        "--rates",
        type=_numbers,
        default=(),
        metavar="X,Y,…",
        help="requests per second; default: the configured rate",
    )
    json = parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    plots = parser.add_argument("--plots", type=Path, metavar="DIRECTORY", help="write plots")
    data.complete = plots.complete = DIRECTORY  # type: ignore[attr-defined]
    json.complete = FILE  # type: ignore[attr-defined]


GROUP = Group(
    "measure and compare",
    (
        BENCH,
        Command(
            name="simulate",
            summary="run the scheduler on a virtual clock",
            description="Runs the live scheduler on a virtual clock under a recorded workload, "
            "with step times from data sheets or from `profile`. Compares policies and rates in "
            "seconds, without a GPU; docs/simulation.md.",
            examples=(
                "--config configs/sim/opt-13b-a100.yaml --data DIRECTORY",
                "--config configs/sim/opt-13b-a100.yaml --data DIRECTORY "
                "--policies fcfs,skip_join_mlfq --rates 2,4 --json result.json",
            ),
            run=_simulate,
            add_arguments=_add_simulate,
        ),
    ),
)
