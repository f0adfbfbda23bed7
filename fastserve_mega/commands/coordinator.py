"""Be the coordinator; rank 0 starts it."""

from __future__ import annotations

import argparse
import logging
import signal

from fastserve_mega.commands.command import Command, load_deployment
from fastserve_mega.commands.options import add_rank_options

_log = logging.getLogger(__name__)


def _coordinator(options: argparse.Namespace) -> int:
    config = load_deployment(options)
    from fastserve_mega.coordinator.main import CoordinatorProcess, RanksGaveUpError
    from fastserve_mega.coordinator.worker_group import WorkersLostError

    try:
        process = CoordinatorProcess(
            config,
            stop_on_stdin_close=options.stop_on_stdin_close,
            supervisor=options.supervisor,
            epoch=options.epoch,
        )
    except (ValueError, OSError) as error:
        _log.error("%s", error)
        return 2
    signal.signal(signal.SIGTERM, process.stop)
    signal.signal(signal.SIGINT, process.stop)
    process.announce()
    try:
        if options.profile_to is not None:
            return 0 if process.write_profile(options.profile_to) else 1
        process.run()
    except RanksGaveUpError as error:
        _log.info("not started: %s", error)
        return 1
    except WorkersLostError as error:
        _log.error("workers lost: %s", error)
        return 1
    except OSError as error:
        _log.error("%s", error)
        return 2
    return 0


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
