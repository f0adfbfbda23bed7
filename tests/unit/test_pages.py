"""Links of README and docs lead somewhere, and the settings that they name are there."""

from __future__ import annotations

import re
import typing
from pathlib import Path

import pytest
from documented import PAGES

from fastserve_mega.records import Record
from fastserve_mega.system.config import Config

NAMES = [page.name for page in PAGES[:-1]] + ["launch/README.md"]


def words(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", words(page), re.M)
    return {re.sub(r"[^\w\- ]", "", each.strip().lower()).replace(" ", "-") for each in headings}


def settings(record: type, before: str = "") -> set[str]:
    """Names of all fields of a configuration, and of its sections."""
    found = set()
    for name, kind in typing.get_type_hints(record).items():
        found.add(f"{before}{name}")
        if isinstance(kind, type) and issubclass(kind, Record):
            found |= settings(kind, f"{before}{name}.")
    return found


SETTINGS = settings(Config)
SECTION = "|".join(name for name in sorted(SETTINGS) if "." not in name)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    lost = []
    for link in re.findall(r"\]\((?!http)([^)\s]+)\)", words(page)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert lost == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_settings_that_are_named_are_there(page):
    named = re.findall(rf"[`\s]((?:{SECTION})\.\w+(?:\.\w+)*)(?=[`=:, ])", words(page))
    files = ("py", "md", "safetensors", "json")
    assert [each for each in named if each not in SETTINGS and not each.endswith(files)] == []


def test_settings_are_found():
    assert "scheduler.mlfq.levels" in SETTINGS
