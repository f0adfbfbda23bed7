"""Print a script for the shell."""

from __future__ import annotations

import argparse

from fastserve_mega.commands.command import Command


def _complete(options: argparse.Namespace) -> int:
    import shtab

    print(shtab.complete(options.parser, shell=options.shell))
    return 0


COMMAND = Command(
    name="completion",
    summary="print a script that completes commands, options and files",
    description="Prints a script with which the shell completes commands, options and files. "
    "For bash: `source <(fastserve-mega completion bash)` in ~/.bashrc; for zsh, save it as "
    "_fastserve-mega in a directory of fpath; for fish, as "
    "~/.config/fish/completions/fastserve-mega.fish.",
    examples=("bash", "zsh", "fish"),
    run=_complete,
    extra="completion",
    add_arguments=lambda parser: parser.add_argument("shell", choices=("bash", "zsh", "fish")),
    config="none",
)
