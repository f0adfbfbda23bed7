"""Commands in README and docs exist, with these options."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from documented import ROOT, named, whole

from fastserve_mega import cli

OURS = whole(r"fastserve-mega \w")


def test_there_are_commands_in_the_pages():
    assert len(OURS) > 20


@pytest.mark.parametrize(("page", "line"), OURS)
def test_each_command_is_understood(page, line):
    words = shlex.split(line)[1:]
    if len(words) == 1:  # prose names commands without what they need
        assert words[0] in {command.name for group in cli.GROUPS for command in group.commands}
        return
    options = cli.make_parser().parse_args(words)
    config = getattr(options, "config", None)
    assert config in (None, "deployment.yaml") or (ROOT / config).is_file()


@pytest.mark.parametrize(("page", "line"), named(r"python -m [a-z]"))
def test_each_module_exists(page, line):
    module = line.split()[2]
    path = ROOT / Path(*module.split("."))
    assert importlib.util.find_spec(module.partition(".")[0]) or path.parts[-3] == "tests"
    assert (
        path.with_suffix(".py").is_file() or (path / "__main__.py").is_file() or "." not in module
    )


@pytest.mark.parametrize(("page", "line"), named(r"make [a-z]"))
def test_each_make_target_exists(page, line):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert line.split()[1] in targets


@pytest.mark.parametrize(("page", "line"), named(r"(python )?(tools|launch|tests)/\S+\.(py|sh)"))
def test_each_script_exists(page, line):
    path = next(word for word in line.split() if "/" in word)
    assert (ROOT / path).is_file()
