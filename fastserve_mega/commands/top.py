"""Watch the scheduler of a running server."""

from __future__ import annotations

import argparse

from fastserve_mega.commands.command import Command, load
from fastserve_mega.system.config_file import load_config


def _top(options: argparse.Namespace) -> int:
    config = load(options, load_config)
    from fastserve_mega.terminal.top import run_top

    return run_top(config, interval_s=max(options.interval, 0.05), once=options.once)


def _add_top(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--once", action="store_true", help="print one view and end")
    parser.add_argument(
        "--interval", type=float, default=0.5, metavar="SECONDS", help="between two views"
    )


COMMAND = Command(
    name="top",
    summary="watch a running server's scheduler in the terminal",
    description="Shows the levels of the queue, the requests on them and the KV pools of "
    "the server at coordinator.client_endpoint, as they change. The HTTP server shows the "
    "same on a web page at /.",
    examples=(
        "--config configs/smollm2-135m-cpu.yaml",
        "--config configs/smollm2-135m-cpu.yaml --once",
    ),
    run=_top,
    add_arguments=_add_top,
)
