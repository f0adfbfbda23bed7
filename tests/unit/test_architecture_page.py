"""What docs/architecture.md names is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fastserve_mega"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
SPANS = sorted(set(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL))))
FILES = [path for room in ("fastserve_mega", "tests", "tools", "configs", "docs")
         for path in (ROOT / room).rglob("*")]  # fmt: skip
PATH = re.compile(r"[\w./-]*(/|\.(py|sh|inl|md|yaml|cfg))")
LIBRARIES = ("torch",)
NAME = re.compile(r"([A-Za-z_]\w*)((?:\.\w+)*)(?:\(.*)?")


def definitions() -> tuple[set[str], dict[str, set[str]]]:
    """All names that the package defines, and those in the body or on `self` of each class."""
    names = {path.stem for path in PACKAGE.rglob("*")}
    members: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names |= defined_by(node)
            if isinstance(node, ast.ClassDef):
                inner = (defined_by(each) for each in ast.walk(node))
                members.setdefault(node.name, set()).update(*inner)
    return names, members


def defined_by(node: ast.AST) -> set[str]:
    match node:
        case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
            return {node.name}
        case ast.Assign():
            targets = node.targets
        case ast.AnnAssign():
            targets = [node.target]
        case _:
            return set()
    return {each.id if isinstance(each, ast.Name) else each.attr for each in targets
            if isinstance(each, ast.Name | ast.Attribute)}  # fmt: skip


def test_files_and_folders_that_are_named_exist():
    paths = [f"/{path.relative_to(ROOT)}{'/' if path.is_dir() else ''}" for path in FILES]
    named = [span.rstrip("/") for span in SPANS if PATH.fullmatch(span)]
    missing = [
        span
        for span in named
        if not any(path.rstrip("/").endswith(f"/{span.lstrip('./')}") for path in paths)
        and not (ROOT / span).exists()
    ]
    assert len(named) > 60
    assert missing == []


def test_classes_functions_and_settings_that_are_named_exist():
    names, members = definitions()
    named = [
        (span, found[1], found[2].split(".")[-1])
        for span in SPANS
        if re.search(r"[A-Z]\w*[a-z]|_|\.", span) and not PATH.fullmatch(span)
        if (found := NAME.fullmatch(span)) and found[1] not in LIBRARIES
    ]
    missing = [
        span
        for span, first, last in named
        if first not in names or last not in members.get(first, names) | {""}
    ]
    assert len(named) > 60
    assert missing == []
