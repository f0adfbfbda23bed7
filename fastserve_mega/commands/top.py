"""Watch the scheduler of a running server."""

from __future__ import annotations

import argparse

from fastserve_mega.commands.command import Command, add_server, server_endpoint


def _top(options: argparse.Namespace) -> int:
    endpoint = server_endpoint(options)
    from fastserve_mega.terminal.top import run_top

    return run_top(endpoint, interval_s=max(options.interval, 0.05), once=options.once)


def _add_top(parser: argparse.ArgumentParser) -> None:
    add_server(parser)
    parser.add_argument("--once", action="store_true", help="print one view and end")
    parser.add_argument(
        "--interval", type=float, default=0.5, metavar="SECONDS", help="between two views"
    )


COMMAND = Command(
    name="top",
    summary="watch a running server's scheduler in the terminal",
    description="Shows the levels of the queue, the requests on them and the KV pools of "
    "a server, as they change. The HTTP server shows the "
    "same on a web page at /.",
    examples=(
        "",
        "--config configs/smollm2-135m-cpu.yaml",
        "--config configs/smollm2-135m-cpu.yaml --once",
    ),
    run=_top,
    extra="terminal",
    config="optional",
    add_arguments=_add_top,
)
