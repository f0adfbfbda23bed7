"""Be an HTTP server of a deployment."""

from __future__ import annotations

import argparse
import socket

from fastserve_mega.commands.command import Command, fail, load_deployment


def _api_server(options: argparse.Namespace) -> int:
    config = load_deployment(options)
    from fastserve_mega.server.api_server import run_server

    descriptor = options.listen_fd
    listener = None if descriptor is None else socket.socket(fileno=descriptor)
    try:
        return run_server(config, listener)
    except (OSError, ValueError) as error:
        return fail(options, error)


def _add_api_server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--listen-fd",
        type=int,
        metavar="FD",
        help="an inherited socket to accept from, instead of server.host and server.port",
    )


COMMAND = Command(
    name="api-server",
    summary="be an OpenAI-compatible HTTP server",
    description="Serves the OpenAI API over HTTP as a client of the coordinator at "
    "coordinator.client_endpoint. `serve` starts one; start more, on any host, when "
    "tokenizing or HTTP takes too much of it.",
    examples=(
        "--config configs/smollm2-135m-cpu.yaml",
        "--config configs/smollm2-135m-cpu.yaml --set server.host=0.0.0.0 --set server.port=8001",
    ),
    run=_api_server,
    extra="server",
    config="optional",
    add_arguments=_add_api_server,
)
