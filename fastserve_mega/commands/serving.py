"""serve, chat, top, api-server: a deployment and its clients."""

from __future__ import annotations

import argparse

from fastserve_mega.commands.command import Command, Group, load, load_deployment, pass_on
from fastserve_mega.system.config_file import load_config


def _serve(options: argparse.Namespace) -> int:
    config = load_deployment(options, weights=True)
    from fastserve_mega.launcher import serve

    return serve(config, pass_on(options))


def _api_server(options: argparse.Namespace) -> int:
    config = load_deployment(options)
    from fastserve_mega.server.main import run_server

    return run_server(config)


def _chat(options: argparse.Namespace) -> int:
    config = load(options, load_config)
    from fastserve_mega.chat import run_chat

    return run_chat(config)


def _top(options: argparse.Namespace) -> int:
    config = load(options, load_config)
    from fastserve_mega.top import run_top

    return run_top(config, interval_s=max(options.interval, 0.05), once=options.once)


def _add_top(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--once", action="store_true", help="print one view and end")
    parser.add_argument(
        "--interval", type=float, default=0.5, metavar="SECONDS", help="between two views"
    )


GROUP = Group(
    "serve a model",
    (
        Command(
            name="serve",
            summary="start ranks, coordinator and HTTP server on this machine",
            description="Starts the ranks (with mpirun when there are several), the coordinator "
            "and the OpenAI-compatible HTTP server on this machine, and says how to use them. The "
            "ranks are started again when one dies; Ctrl-C ends everything.",
            examples=(
                "--config configs/smollm2-135m-cpu.yaml",
                "--config configs/smollm2-135m-cpu.yaml --set parallel.pipeline=1 "
                "--set server.port=8080",
            ),
            run=_serve,
        ),
        Command(
            name="chat",
            summary="talk to a running server in the terminal",
            description="Reads questions from the terminal and streams the answers of the server "
            "at coordinator.client_endpoint. An empty line or Ctrl-D ends it.",
            examples=(
                "--config configs/smollm2-135m-cpu.yaml",
                "--config configs/smollm2-135m-cpu.yaml "
                "--set coordinator.client_endpoint=tcp://10.0.0.1:5570",
            ),
            run=_chat,
        ),
        Command(
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
        ),
        Command(
            name="api-server",
            summary="be an OpenAI-compatible HTTP server",
            description="Serves the OpenAI API over HTTP as a client of the coordinator at "
            "coordinator.client_endpoint. `serve` starts one; start more, on any host, when "
            "tokenizing or HTTP takes too much of it.",
            examples=(
                "--config configs/smollm2-135m-cpu.yaml",
                "--config configs/smollm2-135m-cpu.yaml --set server.host=0.0.0.0 "
                "--set server.port=8001",
            ),
            run=_api_server,
        ),
    ),
)
