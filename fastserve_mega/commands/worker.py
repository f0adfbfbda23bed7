"""Be one rank; launchers start it."""

from __future__ import annotations

import argparse

from fastserve_mega.commands.command import Command, load, pass_on
from fastserve_mega.commands.options import add_rank_options, add_runner
from fastserve_mega.system.config_file import load_config


def _worker(options: argparse.Namespace) -> int:
    config = load(options, load_config)
    from fastserve_mega.worker.rank import run_worker

    arguments = pass_on(options)
    if options.supervisor is not None:
        arguments += ["--supervisor", str(options.supervisor)]
    if options.epoch:
        arguments += ["--epoch", options.epoch]
    if options.profile_to:
        arguments += ["--profile-to", str(options.profile_to)]
    supervised = options.supervisor is not None
    return run_worker(config, arguments, options.runner, supervised=supervised)


def _add_worker(parser: argparse.ArgumentParser) -> None:
    add_runner(parser)
    add_rank_options(parser)


COMMAND = Command(
    name="worker",
    summary="be one rank; for mpirun, torchrun, srun",
    description="Is one rank: holds its share of the model and executes what the "
    "coordinator plans. Start parallel.data x pipeline x tensor of them, on all hosts "
    "with the same configuration; rank 0 starts the coordinator.",
    examples=("--config configs/smollm2-135m-cpu.yaml --set parallel.pipeline=1",),
    run=_worker,
    extra="worker",
    config="optional",
    add_arguments=_add_worker,
)
