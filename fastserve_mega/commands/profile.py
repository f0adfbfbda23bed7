"""Measure the step times of the ranks."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastserve_mega.commands.command import FILE, Command, complete_with, load_deployment, pass_on


def _profile(options: argparse.Namespace) -> int:
    config = load_deployment(options, weights=True)
    from fastserve_mega.launcher import profile

    return profile(config, pass_on(options), options.output)


def _add_profile(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="JSON, for scheduler.profile"
    )
    complete_with(output, FILE)


COMMAND = Command(
    name="profile",
    summary="measure the step times of the ranks",
    description="Starts the ranks, measures how long steps of many sizes take, and writes "
    "a file for scheduler.profile. Do it once per model and machine: the scheduler and "
    "the simulator then need not guess.",
    examples=(
        "--config configs/smollm2-135m-cpu.yaml --output profile.json",
        "--config configs/smollm2-135m-cpu.yaml --set parallel.pipeline=1 --output one-rank.json",
    ),
    run=_profile,
    add_arguments=_add_profile,
)
