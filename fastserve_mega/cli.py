"""The command line: `fastserve-mega <command> --help`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

from fastserve_mega import __version__
from fastserve_mega.config import Config, load_config

Command = Callable[[argparse.Namespace, Config], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.WARNING,
        format=f"%(levelname)s {options.command}: %(message)s",
        stream=sys.stderr,
    )
    try:
        config = load_config(options.config, options.overrides)
    except (ValueError, OSError) as error:
        print(f"fastserve-mega {options.command}: {error}", file=sys.stderr)
        return 2
    command: Command = options.run
    return command(options, config)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastserve-mega",
        description="Serve large language models with a skip-join multi-level feedback queue.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add(commands, "serve", _serve, "start ranks, coordinator and HTTP server on this machine")
    worker = _add(commands, "worker", _worker, "be one rank; for mpirun, torchrun, srun")
    worker.add_argument(
        "--runner",
        choices=("megatron", "fake"),
        default="megatron",
        help="what computes tokens; 'fake' needs no weights and is for tests",
    )
    coordinator = _add(commands, "coordinator", _coordinator, "be the coordinator; for rank 0")
    coordinator.add_argument(
        "--stop-on-stdin-close", action="store_true", help="end when the parent process does"
    )
    _add(commands, "api-server", _api_server, "be an OpenAI-compatible HTTP server")
    _add(commands, "chat", _chat, "talk to a running server in the terminal")
    return parser


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Command,
    text: str,
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text)
    command.add_argument("--config", required=True, metavar="YAML", help="the deployment")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="SECTION.FIELD=VALUE",
        help="override one value of the configuration; may be given several times",
    )
    command.add_argument("-v", "--verbose", action="store_true", help="log what happens")
    command.set_defaults(run=run)
    return command


def _pass_on(options: argparse.Namespace) -> list[str]:
    """The arguments that give a child process the same configuration."""
    arguments = ["--config", options.config]
    for override in options.overrides:
        arguments += ["--set", override]
    return [*arguments, "--verbose"] if options.verbose else arguments


# Each command imports its own layer: a coordinator never loads torch, a worker no HTTP server.


def _serve(options: argparse.Namespace, config: Config) -> int:
    from fastserve_mega.launcher import serve

    return serve(config, _pass_on(options))


def _worker(options: argparse.Namespace, config: Config) -> int:
    from fastserve_mega.worker.main import run_worker

    return run_worker(config, _pass_on(options), options.runner)


def _coordinator(options: argparse.Namespace, config: Config) -> int:
    from fastserve_mega.coordinator.main import run_coordinator

    return run_coordinator(config, stop_on_stdin_close=options.stop_on_stdin_close)


def _api_server(options: argparse.Namespace, config: Config) -> int:
    from fastserve_mega.server.main import run_server

    return run_server(config)


def _chat(options: argparse.Namespace, config: Config) -> int:
    from fastserve_mega.chat import run_chat

    return run_chat(config)
