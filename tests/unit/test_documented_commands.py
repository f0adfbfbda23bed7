"""Commands in README and docs exist, with these options."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from fastserve_mega import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "launch" / "README.md"]
PLACEHOLDER = re.compile(r"[…<>]|\.\.\.|[A-Z]{2,}|\bX\b|--\w+$")


def commands():
    """(page, command line) of all code in pages, lines that go on joined."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        blocks = re.findall(r"```(?:console|bash|sh)\n(.*?)```", text, re.DOTALL)
        indented = re.findall(
            r"^    (\S.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.M
        )
        lines = [line for block in blocks for line in block.splitlines()] + indented
        lines += re.findall(r"`([^`\n]+)`", text)
        for line in lines:
            for part in re.split(r"\s*(?:\||&&|;)\s*", re.sub(r"\s#.*", "", line.strip())):
                yield page.name, part.strip()


def named(pattern):
    found = {(page, line) for page, line in commands() if re.match(pattern, line)}
    return sorted(found)


OURS = [each for each in named(r"fastserve-mega \w") if not PLACEHOLDER.search(each[1])]


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
    assert config is None or (ROOT / config).is_file()


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
