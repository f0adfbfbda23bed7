"""Check this machine."""

from __future__ import annotations

import argparse

from fastserve_mega.commands.command import Command


def _doctor(options: argparse.Namespace) -> int:
    from fastserve_mega.doctor.doctor import run_doctor

    return run_doctor(options.config, options.overrides, as_json=options.json)


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="a list of findings")


COMMAND = Command(
    name="doctor",
    summary="check this machine, and say what to install or change",
    description="Checks Python, torch, devices, MPI and the libraries, each in a process "
    "of its own; with --config or MODEL also ports, model files, disk and memory for it. Ends with "
    "status 1 when something is broken.",
    examples=("", "--config configs/smollm2-135m-cpu.yaml"),
    run=_doctor,
    add_arguments=_add_doctor,
    config="model",
)
