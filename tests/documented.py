"""The commands that README and docs show."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "launch" / "README.md"]

PLACEHOLDER = re.compile(r"[…<>$]|\.\.\.|[A-Z]{2,}|\bX\b")


def commands() -> Iterator[tuple[str, str]]:
    """(page, command line) of all code in the pages, lines that go on joined."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        lines = [
            line
            for language, block in re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL)
            if language == "console"
            for line in block.splitlines()
        ]
        lines += re.findall(r"^    (\S.*)$", prose, re.M)
        lines += re.findall(r"`([^`]+)`", prose)
        for line in lines:
            for part in re.split(r"\s*(?:\||&&|;)\s*", re.sub(r"\s#.*", "", line.strip())):
                yield page.name, " ".join(part.split())


def named(pattern: str) -> list[tuple[str, str]]:
    """(page, command line) of those that begin like this, each once."""
    return sorted({(page, line) for page, line in commands() if re.match(pattern, line)})


def whole(pattern: str) -> list[tuple[str, str]]:
    """Those of them that can be pasted: prose also names commands without what they need."""
    return [each for each in named(pattern) if not PLACEHOLDER.search(each[1])]
