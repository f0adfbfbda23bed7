"""The command line: `fastserve-mega <command> --help`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar, get_args

from fastserve_mega import __version__
from fastserve_mega.config import PolicyName, load_config

T = TypeVar("T")
Command = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.WARNING,
        format=f"%(levelname)s {options.command}: %(message)s",
        stream=sys.stderr,
    )
    command: Command = options.run
    return command(options)


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
    _add_supervised(worker)
    _add_profile_to(worker)
    coordinator = _add(commands, "coordinator", _coordinator, "be the coordinator; for rank 0")
    coordinator.add_argument(
        "--stop-on-stdin-close", action="store_true", help="end when the parent process does"
    )
    _add_supervised(coordinator)
    _add_profile_to(coordinator)
    _add(commands, "api-server", _api_server, "be an OpenAI-compatible HTTP server")
    _add(commands, "chat", _chat, "talk to a running server in the terminal")
    top = _add(commands, "top", _top, "watch a running server's scheduler in the terminal")
    top.add_argument("--once", action="store_true", help="print one view and end")
    top.add_argument(
        "--interval", type=float, default=0.5, metavar="SECONDS", help="between two views"
    )
    profile = _add(commands, "profile", _profile, "measure the step times of the ranks")
    profile.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="JSON, for scheduler.profile"
    )
    plan = _add(commands, "plan", _plan, "compute what goes on which rank, and whether it fits")
    plan.add_argument("--json", action="store_true", help="all figures, sizes in bytes")
    _add_simulate(commands)
    return parser


def _add_supervised(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--supervised",
        action="store_true",
        help="somebody starts the ranks again when one is lost: leave requests unfinished then",
    )


def _add_profile_to(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--profile-to",
        type=Path,
        metavar="FILE",
        help="measure step times, write them here and end; what `profile` starts",
    )


def _add_simulate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    simulate = _add(commands, "simulate", _simulate, "run the scheduler on a virtual clock")
    simulate.add_argument(
        "--data", type=Path, default=Path(), metavar="DIRECTORY", help="where the workload file is"
    )
    simulate.add_argument(
        "--policies",
        type=_names,
        default=(),
        metavar="A,B,…",
        help="policies to compare; default: the configured one",
    )
    simulate.add_argument(
        "--rates",
        type=_numbers,
        default=(),
        metavar="X,Y,…",
        help="requests per second; default: the configured rate",
    )
    simulate.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    simulate.add_argument("--plots", type=Path, metavar="DIRECTORY", help="write plots")


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := sorted(set(names) - set(get_args(PolicyName))):
        known = ", ".join(get_args(PolicyName))
        raise argparse.ArgumentTypeError(f"unknown policy {unknown[0]!r}; known are {known}")
    return names


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"not numbers separated by commas: {text!r}") from None


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Command,
    text: str,
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text)
    command.add_argument("--config", required=True, metavar="YAML", help="what to run")
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


def _load(options: argparse.Namespace, load: Callable[[str, Sequence[str]], T]) -> T:
    """The configuration, or one sentence on stderr and exit status 2."""
    try:
        return load(options.config, options.overrides)
    except (ValueError, OSError) as error:
        print(f"fastserve-mega {options.command}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


# Each command imports its own layer: a coordinator never loads torch, a worker no HTTP server.


def _serve(options: argparse.Namespace) -> int:
    from fastserve_mega.launcher import serve

    return serve(_load(options, load_config), _pass_on(options))


def _worker(options: argparse.Namespace) -> int:
    from fastserve_mega.worker.main import run_worker

    arguments = _pass_on(options)
    if options.supervised:
        arguments.append("--supervised")
    if options.profile_to:
        arguments += ["--profile-to", str(options.profile_to)]
    return run_worker(
        _load(options, load_config), arguments, options.runner, supervised=options.supervised
    )


def _coordinator(options: argparse.Namespace) -> int:
    from fastserve_mega.coordinator.main import run_coordinator

    config = _load(options, load_config)
    return run_coordinator(
        config,
        stop_on_stdin_close=options.stop_on_stdin_close,
        supervised=options.supervised,
        profile_to=options.profile_to,
    )


def _api_server(options: argparse.Namespace) -> int:
    from fastserve_mega.server.main import run_server

    return run_server(_load(options, load_config))


def _chat(options: argparse.Namespace) -> int:
    from fastserve_mega.chat import run_chat

    return run_chat(_load(options, load_config))


def _top(options: argparse.Namespace) -> int:
    from fastserve_mega.top import run_top

    config = _load(options, load_config)
    return run_top(config, interval_s=max(options.interval, 0.05), once=options.once)


def _profile(options: argparse.Namespace) -> int:
    from fastserve_mega.launcher import profile

    return profile(_load(options, load_config), _pass_on(options), options.output)


def _plan(options: argparse.Namespace) -> int:
    from fastserve_mega.planning.report import run_plan

    config = _load(options, load_config)
    try:
        return run_plan(config, Path(options.config), as_json=options.json)
    except ValueError as error:
        print(f"fastserve-mega plan: {error}", file=sys.stderr)
        return 2


def _simulate(options: argparse.Namespace) -> int:
    from fastserve_mega.simulator.config import load_simulation_config
    from fastserve_mega.simulator.main import run_simulate

    config = _load(options, load_simulation_config)
    try:
        return run_simulate(
            config,
            data=options.data,
            policies=options.policies,
            rates=options.rates,
            json_path=options.json,
            plots=options.plots,
        )
    except (ValueError, OSError) as error:
        print(f"fastserve-mega simulate: {error}", file=sys.stderr)
        return 2
