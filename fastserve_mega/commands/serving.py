"""serve, chat, api-server: a deployment and its clients."""

from __future__ import annotations

import argparse

from fastserve_mega.commands.command import Command, Group, load, pass_on
from fastserve_mega.config import load_config


def _serve(options: argparse.Namespace) -> int:
    config = load(options, load_config)
    from fastserve_mega.launcher import serve

    return serve(config, pass_on(options))


def _api_server(options: argparse.Namespace) -> int:
    config = load(options, load_config)
    from fastserve_mega.server.main import run_server

    return run_server(config)


def _chat(options: argparse.Namespace) -> int:
    config = load(options, load_config)
    from fastserve_mega.chat import run_chat

    return run_chat(config)


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
