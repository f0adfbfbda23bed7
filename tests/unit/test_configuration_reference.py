"""docs/configuration.md says what fastserve_mega/system/config.py says."""

from __future__ import annotations

import sys
import typing
from pathlib import Path

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import configuration_reference as tool

from fastserve_mega.system.config import Config

EXAMPLE = '''
Word = Literal["a", "b"]
class Inner:
    """Inside."""
    numbers: tuple[int, ...] | None = None
    """Several
    lines | None."""
    word: Word = "a"
class Config:
    """All."""
    path: str
    """Where."""
    inner: Inner = field(default_factory=Inner)
'''


def test_the_page_is_current(capsys):
    assert tool.main(["--check"]) == 0, capsys.readouterr().out


def test_a_page_that_is_not_current_is_noticed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, "TARGET", tmp_path / "configuration.md")
    assert tool.main(["--check"]) == 1
    assert "run tools/configuration_reference.py" in capsys.readouterr().out
    assert tool.main([]) == 0
    assert tool.main(["--check"]) == 0


def leaves(kind, prefix=""):
    for name, hint in typing.get_type_hints(kind).items():
        if msgspec.inspect.is_struct_type(hint):
            yield from leaves(hint, f"{prefix}{name}.")
        else:
            yield prefix + name


@pytest.mark.parametrize("name", list(leaves(Config)))
def test_every_setting_is_explained(name):
    """Python's view of the types against the tool's, which reads their source."""
    page = tool.TARGET.read_text(encoding="utf-8")
    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
    kind, default, meaning = (cell.strip() for cell in row.split(" | ")[1:])
    assert kind
    assert default != "``"
    assert len(meaning.rstrip("| ")) > 5, f"{name} has no docstring in config.py"


def test_an_example_by_hand():
    page = tool.reference(tool.read_sections(EXAMPLE))
    assert "## inner\n\nInside.\n" in page
    assert (
        r"| `inner.numbers` | list of integer or null | `null` | Several lines \| null. |" in page
    )
    assert "| `inner.word` | `a`, `b` | `a` |  |" in page
