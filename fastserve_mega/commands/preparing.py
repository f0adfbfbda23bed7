"""doctor, plan, profile: before a deployment."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastserve_mega.commands.command import FILE, Command, Group, fail, load, pass_on
from fastserve_mega.config import load_config


def _plan(options: argparse.Namespace) -> int:
    config = load(options, load_config)
    from fastserve_mega.planning.report import run_plan

    try:
        return run_plan(config, Path(options.config), as_json=options.json)
    except ValueError as error:
        return fail(options, error)


def _profile(options: argparse.Namespace) -> int:
    config = load(options, load_config)
    from fastserve_mega.launcher import profile

    return profile(config, pass_on(options), options.output)


def _doctor(options: argparse.Namespace) -> int:
    if options.overrides and options.config is None:
        return fail(options, "--set overrides a configuration: give --config too")
    from fastserve_mega.doctor.report import run_doctor

    return run_doctor(options.config, options.overrides, as_json=options.json)


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="a list of findings")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="all figures, sizes in bytes")


def _add_profile(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="JSON, for scheduler.profile"
    )
    output.complete = FILE  # type: ignore[attr-defined]


GROUP = Group(
    "prepare a deployment",
    (
        Command(
            name="doctor",
            summary="check this machine, and say what to install or change",
            description="Checks Python, torch, devices, MPI and the libraries, each in a process "
            "of its own; with --config also ports, model files, disk and memory for it. Ends with "
            "status 1 when something is broken.",
            examples=("", "--config configs/smollm2-135m-cpu.yaml"),
            run=_doctor,
            add_arguments=_add_doctor,
            config=None,
        ),
        Command(
            name="plan",
            summary="compute what goes on which rank, and whether it fits",
            description="Computes layers, heads, weights and KV blocks of each rank from the "
            "configuration and the model's config.json, without a GPU or weights. Ends with "
            "status 1 and says why when something does not fit.",
            examples=(
                "--config configs/llama-3-70b-4xh100.yaml",
                "--config configs/llama-3-70b-4xh100.yaml --set hardware.device_memory_gb=40 "
                "--json",
            ),
            run=_plan,
            add_arguments=_add_plan,
        ),
        Command(
            name="profile",
            summary="measure the step times of the ranks",
            description="Starts the ranks, measures how long steps of many sizes take, and writes "
            "a file for scheduler.profile. Do it once per model and machine: the scheduler and "
            "the simulator then need not guess.",
            examples=(
                "--config configs/smollm2-135m-cpu.yaml --output profile.json",
                "--config configs/smollm2-135m-cpu.yaml --set parallel.pipeline=1 "
                "--output one-rank.json",
            ),
            run=_profile,
            add_arguments=_add_profile,
        ),
    ),
)
