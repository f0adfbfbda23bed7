"""Files and functions are short enough to be read in one go."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    path for room in ("fastserve_mega", "tests", "tools") for path in (ROOT / room).rglob("*.py")
)
MOST_LINES = 300
LONGER_FILES = {  # to be split when they are worked on next
    # One record a section of the YAML, and a sentence a setting.
    "fastserve_mega/system/config.py": 340,
}
MOST_LINES_OF_A_FUNCTION = 50
"""Without its signature and its docstring."""
LONGER_FUNCTIONS = {
    # One program of the device each.
    "fastserve_mega/worker/kernels/attention.py": 90,
    "fastserve_mega/worker/kernels/pages.py": 60,
    "fastserve_mega/worker/kernels/sampling.py": 80,
}


def test_files_and_functions_are_short():
    too_long = []
    for path in SOURCES:
        name, source = str(path.relative_to(ROOT)), path.read_text()
        if (lines := len(source.splitlines())) > LONGER_FILES.get(name, MOST_LINES):
            too_long.append(f"{name} has {lines} lines")
        limit = LONGER_FUNCTIONS.get(name, MOST_LINES_OF_A_FUNCTION)
        too_long += [f"{name}: {each} has {n}" for each, n in bodies(source) if n > limit]
    assert too_long == []


def bodies(source: str) -> Iterator[tuple[str, int]]:
    """Each function's name, and how many lines its body has."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            yield node.name, node.body[-1].end_lineno - body[0].lineno + 1 if body else 0
