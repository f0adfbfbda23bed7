"""Changes to JSON schemas: in each schema that is part of one, and in none of their data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]

_DATA = frozenset({"const", "enum", "default", "examples", "example"})
"""Keywords whose values are no schemas, whatever they look like."""
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
"""Keywords whose values are maps from any name to a schema."""


def rewrite(schema: Any, change: Callable[[Schema], Schema]) -> Any:
    """A copy of a schema in which it and each schema in it has been changed, inner ones first.

    Raises:
        RecursionError: it is nested too deeply.
    """
    if isinstance(schema, list):
        return [rewrite(each, change) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return change({key: _rewrite_value(key, value, change) for key, value in schema.items()})


def _rewrite_value(key: str, value: Any, change: Callable[[Schema], Schema]) -> Any:
    if key in _DATA:
        return value
    if key in _NAMED and isinstance(value, dict):
        return {name: rewrite(each, change) for name, each in value.items()}
    return rewrite(value, change)


def as_definition(schema: Schema, name: str) -> Schema:
    """A whole schema as it has to be to stand in another one as `$defs/NAME`.

    References within it are by their path from the top, so they change with it; it is no document
    of its own any more.

    Args:
        schema: with a type or without one.
        name: without the characters ~, / and %.
    """
    top = f"#/$defs/{name}"

    def move(each: Schema) -> Schema:
        target = each.get("$ref")
        if isinstance(target, str) and (target == "#" or target.startswith("#/")):
            return {**each, "$ref": top + target[1:]}
        return each

    whole = {key: value for key, value in schema.items() if key not in ("$id", "$schema")}
    moved: Schema = rewrite(whole, move)
    return moved
