"""The command line: `fastserve-mega <command> --help`."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
import textwrap
from collections.abc import Sequence

from fastserve_mega import __version__
from fastserve_mega.commands import (
    api_key,
    api_server,
    batch,
    bench,
    chat,
    compare_policies,
    completion,
    convert,
    coordinator,
    doctor,
    drill,
    init,
    keygen,
    plan,
    profile,
    replay,
    serve,
    simulate,
    story,
    top,
    worker,
)
from fastserve_mega.commands.command import CommandParser, Group, add_command, fail
from fastserve_mega.logs import discard_output, set_up_logging

GROUPS: tuple[Group, ...] = (
    Group(
        "serve a model",
        (serve.COMMAND, chat.COMMAND, batch.COMMAND, top.COMMAND, api_server.COMMAND),
    ),
    Group(
        "prepare a deployment",
        (
            init.COMMAND,
            doctor.COMMAND,
            plan.COMMAND,
            profile.COMMAND,
            convert.COMMAND,
            keygen.COMMAND,
            api_key.COMMAND,
        ),
    ),
    Group(
        "measure and compare",
        (
            bench.COMMAND,
            drill.COMMAND,
            simulate.COMMAND,
            compare_policies.COMMAND,
            replay.COMMAND,
            story.COMMAND,
        ),
    ),
    Group("be a part of it, for launchers", (worker.COMMAND, coordinator.COMMAND)),
    Group("the shell", (completion.COMMAND,)),
)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_INTERRUPTED = 130
"""What a shell says of a program that Ctrl-C has ended."""
_FIRST_STEPS = """\
first steps:
  fastserve-mega doctor MODEL     is everything there?
  fastserve-mega plan MODEL       does it fit?
  fastserve-mega serve MODEL      start it
  fastserve-mega chat             talk to it
  fastserve-mega init MODEL       write all settings to a file, for --config
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run one command; returns the exit status."""
    _prepare_standard_files()
    try:
        status = _run(arguments)
        print(end="", flush=True)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        discard_output()  # its reader wants no more, as `head`
        return 1
    except OSError as error:
        if error.errno not in _FULL:
            raise
        discard_output()
        print(f"fastserve-mega: {error.filename or 'output'}: {error.strerror}", file=sys.stderr)
        return 1
    return status


def _run(arguments: Sequence[str] | None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 2
    set_up_logging(options.command, verbose=options.verbose, log_format=options.log_format)
    try:
        status: int = options.run(options)
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module in ("", __package__):
            raise
        return fail(options, f"it needs {module}: pip install 'fastserve_mega[{options.extra}]'")
    return status


def _prepare_standard_files() -> None:
    """Make sure that what is printed disturbs nothing, however this was started.

    Where stdin, stdout or stderr is closed, a socket would get its number, and lose it again. What
    the encoding of a locale lacks is printed as an escape.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            stays_open = open(number, "w" if number else "r", closefd=False)  # noqa: SIM115 - for good
            setattr(sys, name, stays_open)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog="fastserve-mega",
        description="Serve large language models over many ranks and hosts, the order decided "
        "anew for every step.",
    )
    parser.set_defaults(parser=parser)  # for `completion`
    parser.add_argument("--version", action="version", version=__version__)
    parsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=CommandParser)
    for group in GROUPS:
        for command in group.commands:
            add_command(parsers, command)
    return parser


class _Parser(argparse.ArgumentParser):
    """Lists the commands by group, which argparse does not."""

    def format_help(self) -> str:
        sections = [self.format_usage().rstrip(), *textwrap.wrap(self.description or "", 79)]
        sections[0] += "\n"
        for group in GROUPS:
            sections.append(f"\n{group.title}:")
            sections += [f"  {each.name:<17}{each.summary}" for each in group.commands]
        sections.append(f"\n{_FIRST_STEPS}\n`fastserve-mega COMMAND --help` explains each.\n")
        return "\n".join(sections)
