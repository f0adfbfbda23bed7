"""Be the coordinator; rank 0 starts it."""

from __future__ import annotations

import argparse

from fastserve_mega.commands.command import Command, add_rank_options, load_deployment


def _coordinator(options: argparse.Namespace) -> int:
    config = load_deployment(options)
    from fastserve_mega.coordinator.main import run_coordinator

    return run_coordinator(
        config,
        stop_on_stdin_close=options.stop_on_stdin_close,
        supervisor=options.supervisor,
        epoch=options.epoch,
        profile_to=options.profile_to,
    )


def _add_coordinator(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stop-on-stdin-close", action="store_true", help="end when the parent process does"
    )
    add_rank_options(parser)


COMMAND = Command(
    name="coordinator",
    summary="be the coordinator; rank 0 starts it",
    description="Is the coordinator: takes requests from clients, schedules each step and "
    "sends it to the ranks. Rank 0 starts it by itself; its first line on stdout has the "
    "addresses.",
    examples=("--config configs/smollm2-135m-cpu.yaml",),
    run=_coordinator,
    config="optional",
    add_arguments=_add_coordinator,
)
