"""Talk to a running server."""

from __future__ import annotations

import argparse

from fastserve_mega.commands.command import Command, load
from fastserve_mega.system.config_file import load_config


def _chat(options: argparse.Namespace) -> int:
    config = load(options, load_config)
    from fastserve_mega.terminal.chat import run_chat

    return run_chat(config)


COMMAND = Command(
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
)
