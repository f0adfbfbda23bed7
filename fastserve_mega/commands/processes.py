"""worker, coordinator: the parts of a deployment that launchers start."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastserve_mega.commands.command import Command, Group, load, load_deployment, pass_on
from fastserve_mega.system.config_file import load_config


def _worker(options: argparse.Namespace) -> int:
    config = load(options, load_config)
    from fastserve_mega.worker.main import run_worker

    arguments = pass_on(options)
    if options.supervised:
        arguments.append("--supervised")
    if options.profile_to:
        arguments += ["--profile-to", str(options.profile_to)]
    return run_worker(config, arguments, options.runner, supervised=options.supervised)


def _coordinator(options: argparse.Namespace) -> int:
    config = load_deployment(options)
    from fastserve_mega.coordinator.main import run_coordinator

    return run_coordinator(
        config,
        stop_on_stdin_close=options.stop_on_stdin_close,
        supervised=options.supervised,
        profile_to=options.profile_to,
    )


def _add_worker(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runner",
        choices=("megatron", "fake"),
        default="megatron",
        help="what computes tokens; 'fake' needs no weights and is for tests",
    )
    _add_common(parser)


def _add_coordinator(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stop-on-stdin-close", action="store_true", help="end when the parent process does"
    )
    _add_common(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--supervised",
        action="store_true",
        help="somebody starts the ranks again when one is lost: leave requests unfinished then",
    )
    parser.add_argument(
        "--profile-to",
        type=Path,
        metavar="FILE",
        help="measure step times, write them here and end; what `profile` starts",
    )


GROUP = Group(
    "be a part of it, for launchers",
    (
        Command(
            name="worker",
            summary="be one rank; for mpirun, torchrun, srun",
            description="Is one rank: holds its share of the model and executes what the "
            "coordinator plans. Start parallel.data x pipeline x tensor of them, on all hosts "
            "with the same configuration; rank 0 starts the coordinator.",
            examples=("--config configs/smollm2-135m-cpu.yaml --set parallel.pipeline=1",),
            run=_worker,
            add_arguments=_add_worker,
        ),
        Command(
            name="coordinator",
            summary="be the coordinator; rank 0 starts it",
            description="Is the coordinator: takes requests from clients, schedules each step and "
            "sends it to the ranks. Rank 0 starts it by itself; its first line on stdout has the "
            "addresses.",
            examples=("--config configs/smollm2-135m-cpu.yaml",),
            run=_coordinator,
            add_arguments=_add_coordinator,
        ),
    ),
)
