"""What a command is to the command line, and what all commands share."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NoReturn, TypeVar

from msgspec import structs

from fastserve_mega.logs import LOG_FORMATS
from fastserve_mega.system.config import Config, CoordinatorConfig
from fastserve_mega.system.config_file import load_config
from fastserve_mega.system.key_file import client_address

T = TypeVar("T")

ConfigUse = Literal["required", "model", "optional", "none"]
"""Whether a command takes --config: `model` may have the name of a model in its place."""
_SHORT_OPTIONS = (
    ("tensor", "parallel.tensor", "ranks that share each layer"),
    ("pipeline", "parallel.pipeline", "stages, each on a rank of its own"),
    ("data", "parallel.data", "copies of the model"),
    ("port", "server.port", "of the HTTP server"),
)
"""Settings that have an option of their own, and what they are."""


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    """Most commands take a configuration and nothing else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One word after `fastserve-mega`."""

    name: str
    summary: str
    """For the list of all commands."""
    description: str
    """What it does and when to use it, for its own help."""
    examples: tuple[str, ...]
    """Command lines that work, without `fastserve-mega NAME`."""
    run: Callable[[argparse.Namespace], int]
    """Returns the exit status."""
    add_arguments: Callable[[argparse.ArgumentParser], object] = _no_arguments
    config: ConfigUse = "required"
    extra: str = "all"
    """What of the package has to be installed for it, should something be missing."""


@dataclass(frozen=True, slots=True)
class Group:
    """Commands that are listed together."""

    title: str
    commands: tuple[Command, ...]


def add_command(parsers: argparse._SubParsersAction[CommandParser], command: Command) -> None:
    """Give a command its parser."""
    lines = "\n".join(
        f"  fastserve-mega {command.name} {line}".rstrip() for line in command.examples
    )
    parser = parsers.add_parser(
        command.name,
        help=command.summary,
        description=command.description,
        epilog=f"examples:\n{lines}",
        formatter_class=HelpFormatter,
    )
    if command.config != "none":
        _add_config(parser, required=command.config == "required")
    if command.config == "model":
        _add_model(parser)
    command.add_arguments(parser)
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="log what happens, and each HTTP request"
    )
    parser.add_argument(
        "--log-format",
        choices=LOG_FORMATS,
        default="auto",
        help="of the log on stderr: one JSON object per line, plain text, or colours; "
        "auto (default): colours on a terminal, else text",
    )
    parser.set_defaults(run=command.run, extra=command.extra)


class CommandParser(argparse.ArgumentParser):
    """Names `--config` to a user who gives a file without it."""

    _given: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Remember the words, of which `error` is not told."""
        self._given = args or ()
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        files = [word for word in self._given if word.endswith((".yaml", ".yml"))]
        if "--config" in message and files:
            message += f"; did you mean --config {files[0]}?"
        super().error(message)


class HelpFormatter(argparse.HelpFormatter):
    """Wraps descriptions, and leaves examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return text
        return super()._fill_text(text, width, indent)


def _add_config(parser: argparse.ArgumentParser, *, required: bool) -> None:
    config = parser.add_argument(
        "--config", required=required, metavar="YAML", help="the deployment; docs/configuration.md"
    )
    complete_with(config, FILE)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="SECTION.FIELD=VALUE",
        help="override one value of the configuration; may be given several times",
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    """What stands for a configuration; given as well as one, it overrides it."""
    model = parser.add_argument(
        "model",
        nargs="?",
        action=_ModelOverride,
        metavar="MODEL",
        help="directory of a model, or its name on the Hugging Face hub: instead of --config, "
        "which may say much more",
    )
    complete_with(model, DIRECTORY)
    for name, field, what in _SHORT_OPTIONS:
        parser.add_argument(
            f"--{name}",
            action="append",
            dest="overrides",
            type=partial("{}={}".format, field),
            metavar="N",
            help=f"{what}; short for --set {field}=N",
        )


class _ModelOverride(argparse.Action):
    """Takes MODEL for `--set model.path=MODEL`."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: object = None
    ) -> None:
        if values is None:
            return
        if values.endswith((".yaml", ".yml")):
            parser.error(f"{values} is no model; a configuration is given with --config")
        namespace.overrides = [*namespace.overrides, f"model.path={json.dumps(values)}"]


FILE = {"bash": "_shtab_compgen_files", "zsh": "_files"}
DIRECTORY = {"bash": "_shtab_compgen_dirs", "zsh": "_files -/"}
"""What shtab completes an argument with; for `complete_with`."""


def complete_with(argument: argparse.Action, files: Mapping[str, str]) -> None:
    """Let the shell complete an argument with files or directories."""
    vars(argument)["complete"] = files


def add_server(parser: argparse.ArgumentParser) -> None:
    """Add what names a running server, in place of the configuration it was started with."""
    parser.add_argument(
        "--url",
        metavar="URL",
        help="of a running server; default: coordinator.client_endpoint of the configuration",
    )


def server_endpoint(options: argparse.Namespace) -> str:
    """Where the server listens that a command is to talk to."""
    if options.url is not None:
        return str(options.url)
    if options.config is None and not options.overrides:
        return CoordinatorConfig().client_endpoint
    return load(options, lambda *given: client_address(load_config(*given).coordinator))


def pass_on(options: argparse.Namespace) -> list[str]:
    """The arguments that give a child process the same configuration and log."""
    arguments = [] if options.config is None else ["--config", options.config]
    for override in options.overrides:
        arguments += ["--set", override]
    if options.verbose:
        arguments.append("--verbose")
    if options.log_format != "auto":
        arguments += ["--log-format", options.log_format]
    return arguments


def load(options: argparse.Namespace, read: Callable[[str | None, Sequence[str]], T]) -> T:
    """The configuration, or one sentence on stderr and exit status 2."""
    if options.config is None and not options.overrides:
        raise SystemExit(fail(options, "say what to serve: MODEL, or --config YAML"))
    try:
        return read(options.config, options.overrides)
    except (ValueError, OSError) as error:
        raise SystemExit(fail(options, error)) from None


def load_deployment(options: argparse.Namespace, *, weights: bool = False) -> Config:
    """The configuration, with the model found on this machine or fetched to it.

    Args:
        options: of the command line.
        weights: whether this machine's ranks are to compute it: then it must be possible to split
            it among them, and its weights must be there.
    """
    from fastserve_mega.models.architecture import load_architecture
    from fastserve_mega.system.locate import resolve_model
    from fastserve_mega.system.partition import check_partition
    from fastserve_mega.system.stored_tensors import check_tensors

    def read(path: str | None, overrides: Sequence[str]) -> Config:
        config = load_config(path, overrides)
        config = structs.replace(config, model=resolve_model(config.model, weights=weights))
        if weights:
            architecture = load_architecture(config.model.directory)
            check_partition(architecture, config.parallel)
            check_tensors(config.model.directory, architecture)
        return config

    return load(options, read)


def fail(options: argparse.Namespace, error: object) -> int:
    """Say on stderr what is wrong with the input; returns exit status 2."""
    if isinstance(error, OSError) and error.filename is not None:
        error = f"{error.filename}: {error.strerror}"
    print(f"fastserve-mega {options.command}: {error}", file=sys.stderr)
    return 2
