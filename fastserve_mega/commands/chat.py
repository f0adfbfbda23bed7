"""Talk to a running server."""

from __future__ import annotations

import argparse

from fastserve_mega.commands.command import Command, add_server, server_endpoint


def _chat(options: argparse.Namespace) -> int:
    endpoint = server_endpoint(options)
    from fastserve_mega.terminal.chat import run_chat

    return run_chat(
        endpoint,
        system=options.system,
        temperature=options.temperature,
        max_tokens=options.max_tokens,
    )


def _add_chat(parser: argparse.ArgumentParser) -> None:
    add_server(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")
    parser.add_argument(
        "--temperature", type=float, default=0.7, metavar="T", help="default 0.7; 0 is greedy"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=512, metavar="N", help="of an answer; default 512"
    )


COMMAND = Command(
    name="chat",
    summary="talk to a running server in the terminal",
    description="Reads questions from the terminal and streams the answers. --url takes the "
    "ZeroMQ address of a coordinator, or the HTTP address of any server with the OpenAI API. "
    "Ctrl-C ends an answer, Ctrl-D the program; /help lists what else can be typed.",
    examples=(
        "",
        "--url http://127.0.0.1:8000 --temperature 0",
        "--config configs/smollm2-135m-cpu.yaml",
    ),
    run=_chat,
    extra="terminal",
    add_arguments=_add_chat,
    config="optional",
)
