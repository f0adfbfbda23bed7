"""doctor, plan, profile, convert: before a deployment."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastserve_mega.commands.command import (
    DIRECTORY,
    FILE,
    Command,
    Group,
    fail,
    load,
    load_deployment,
    pass_on,
)
from fastserve_mega.system.config_file import load_config


def _plan(options: argparse.Namespace) -> int:
    config = load(options, load_config)
    from fastserve_mega.commands.plan_report import run_plan

    try:
        return run_plan(config, Path(options.config), as_json=options.json)
    except ValueError as error:
        return fail(options, error)


def _profile(options: argparse.Namespace) -> int:
    config = load_deployment(options, weights=True)
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


def _convert(options: argparse.Namespace) -> int:
    from fastserve_mega.worker.megatron.convert import convert

    try:
        convert(options.source, options.target, options.output_format)
    except (ValueError, OSError) as error:
        return fail(options, error)
    return 0


def _add_convert(parser: argparse.ArgumentParser) -> None:
    source = parser.add_argument(
        "--from", type=Path, required=True, dest="source", metavar="DIRECTORY",
        help="a model in the other format: config.json and weights",
    )  # fmt: skip
    target = parser.add_argument(
        "--to", type=Path, required=True, dest="target", metavar="DIRECTORY",
        help="where to write it; empty, or not there yet",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=("torch_dist", "huggingface"), required=True, dest="output_format",
        help="torch_dist: Megatron's distributed checkpoint; huggingface: safetensors",
    )  # fmt: skip
    source.complete = target.complete = DIRECTORY  # type: ignore[attr-defined]


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
        Command(
            name="convert",
            summary="write a model in the format of Megatron or of Hugging Face",
            description="Writes a model directory in the other format: config.json and tokenizer "
            "are copied, the weights are the same bit for bit. Runs on one CPU with a layer in "
            "memory at a time; either format can be served over any number of ranks.",
            examples=(
                "--from llama-3-8b --to llama-3-8b-megatron --format torch_dist",
                "--from llama-3-8b-megatron --to llama-3-8b-again --format huggingface",
            ),
            run=_convert,
            add_arguments=_add_convert,
            config=False,
        ),
    ),
)
