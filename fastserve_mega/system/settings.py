"""The settings of a deployment with their meanings, read from the source of their records.

Records describe a field by the string literal after it, which Python itself does not keep.
"""

from __future__ import annotations

import ast
import re
import textwrap
from dataclasses import dataclass
from inspect import getsource
from typing import Any

import msgspec
import yaml

from fastserve_mega import records
from fastserve_mega.system import config as config_module
from fastserve_mega.system import hardware
from fastserve_mega.system.config import Config

_WIDTH = 96
_END = "...\n"
"""What YAML writes after a single word."""
_NAMES = {
    "None": "null", "True": "true", "False": "false", "str": "string", "int": "integer",
    "float": "number", "bool": "true or false", "Mapping[str, int]": "mapping", "Device": "mapping",
    "Link": "mapping", "SyntheticLengths": "mapping", "Lognormal": "mapping",
    "field(default_factory=dict)": "{}",
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """A field of a configuration record; `type` and `default` as in YAML."""

    name: str
    type: str
    default: str
    meaning: str
    section: str | None = None
    """The record, when the field is a section of its own."""


@dataclass(frozen=True)
class Section:
    """A configuration record."""

    meaning: str
    settings: tuple[Setting, ...]


def read_sections(*sources: str) -> dict[str, Section]:
    """All records of modules, by name."""
    body = [node for source in sources for node in ast.parse(source).body]
    classes = [node for node in body if isinstance(node, ast.ClassDef)]
    aliases = {
        target.id: node.value
        for node in body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    known = {node.name for node in classes}
    return {
        node.name: Section(_plain(ast.get_docstring(node)), tuple(_settings(node, known, aliases)))
        for node in classes
    }


def _settings(node: ast.ClassDef, known: set[str], aliases: dict[str, ast.expr]) -> list[Setting]:
    """The fields of a record, each with the string literal after it as its meaning."""
    found = []
    for field, after in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        meaning = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            meaning = _plain(after.value.value)
        name, kind = field.target.id, ast.unparse(field.annotation)
        found.append(
            Setting(
                name,
                _type_text(field.annotation, aliases),
                "required" if field.value is None else _yaml_text(field.value),
                meaning,
                section=kind if kind in known else None,
            )
        )
    return found


def _type_text(node: ast.expr, aliases: dict[str, ast.expr]) -> str:
    """A type as users of YAML would call it."""
    match node:
        case ast.Name(id=name) if name in aliases:
            return _type_text(aliases[name], aliases)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return f"{_type_text(left, aliases)} or {_type_text(right, aliases)}"
        case ast.Subscript(value=ast.Name(id="Annotated"), slice=ast.Tuple(elts=[kind, *_])):
            return _type_text(kind, aliases)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=words):
            values = words.elts if isinstance(words, ast.Tuple) else [words]
            return ", ".join(f"`{_yaml_text(value)}`" for value in values)
        case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=[item, _])):
            return f"list of {_type_text(item, aliases)}"
        case _:
            pass
    text = ast.unparse(node)
    return _NAMES.get(text, text)


def _yaml_text(node: ast.expr) -> str:
    """A default value as it is written in YAML."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    text = ast.unparse(node)
    return _NAMES.get(text, text)


def _plain(docstring: object) -> str:
    """On one line, in the words of YAML."""
    words = " ".join(str(docstring or "").split())
    return re.sub(r"\bNone\b", "null", words).replace("|", "\\|")


def commented_yaml(config: Config) -> str:
    """All settings of a deployment as a configuration file, each below its meaning."""
    sections = read_sections(*map(getsource, (records, config_module, hardware)))
    values: dict[str, Any] = msgspec.to_builtins(config)
    return "\n".join(_lines(sections, "Config", values, depth=0)) + "\n"


def _lines(
    sections: dict[str, Section], name: str, values: dict[str, Any], depth: int
) -> list[str]:
    indent = "  " * depth
    lines = []
    for each in sections[name].settings:
        meaning = sections[each.section].meaning if each.section else each.meaning
        said = meaning.replace("\\|", "|")
        lines += ["", *_comment(said, indent)] if depth == 0 else _comment(said, indent)
        value = values[each.name]
        if each.section and isinstance(value, dict):
            lines.append(f"{indent}{each.name}:")
            lines += _lines(sections, each.section, value, depth + 1)
        else:
            written = yaml.safe_dump(value, default_flow_style=True, width=1000)
            lines.append(f"{indent}{each.name}: {written.removesuffix(_END).strip()}")
    return lines


def _comment(text: str, indent: str) -> list[str]:
    start = f"{indent}# "
    return textwrap.wrap(text, _WIDTH, initial_indent=start, subsequent_indent=start)
