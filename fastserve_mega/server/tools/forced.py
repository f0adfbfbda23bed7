"""Calls that the request insists on: the output is held to their form, whatever the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastserve_mega.server.tools.call_reader import CallReader
from fastserve_mega.server.tools.pieces import CallPiece, Functions, Piece
from fastserve_mega.text.structured import as_definition

_NO_ARGUMENTS: dict[str, Any] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}
_OF_NO_CONSEQUENCE = {"type", "properties", "required", "title", "description", "$schema", "$id"}
"""Keywords beside which an empty list of properties stays one."""


class NamedCall:
    """The whole answer is the arguments of one function."""

    is_forced = True

    def __init__(self, name: str) -> None:
        self._name: str | None = name

    def push(self, text: str) -> Sequence[Piece]:
        if not text:
            return []
        name, self._name = self._name, None
        return [CallPiece(0, name, text)]

    def finish(self) -> Sequence[Piece]:
        return []


class RequiredCalls:
    """The whole answer is an array of {"name": …, "arguments": …}."""

    is_forced = False

    def __init__(self) -> None:
        self._calls = 0
        self._call = CallReader(0)
        self._between = True

    def push(self, text: str) -> Sequence[Piece]:
        pieces: list[Piece] = []
        # The output is held to its form, so a call begins at each brace between two calls.
        while text:
            if self._between:
                text = text[text.find("{") :] if "{" in text else ""
                self._between = not text
                continue
            pieces += self._call.push(text)
            if not self._call.complete:
                break
            text = self._call.rest
            self._calls += 1
            self._call, self._between = CallReader(self._calls), True
        return pieces

    def finish(self) -> Sequence[Piece]:
        return []


def required_schema(functions: Functions, *, several: bool) -> dict[str, Any]:
    """What `RequiredCalls` reads.

    Raises:
        ValueError: the arguments of a function are no object.
        RecursionError: a schema is nested too deeply.
    """
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/{name}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name in functions
    ]
    array = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    limit = {} if several else {"maxItems": 1}
    # Each has its own definitions, often under the same names.
    definitions = {name: as_definition(named_schema(functions, name), name) for name in functions}
    return {**array, **limit, "$defs": definitions}


def named_schema(functions: Functions, name: str) -> dict[str, Any]:
    """What `NamedCall` reads: a function's arguments, an object whatever their schema leaves open.

    Raises:
        ValueError: they are no object.
    """
    schema = functions[name] or _NO_ARGUMENTS
    kind = schema.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise ValueError(
            f"the parameters of the function {name!r} must be of type 'object', got {kind!r}"
        )
    # Whoever lists no properties, as servers of tools do, wants none: elsewhere in a schema it
    # would allow any.
    if schema.get("properties") == {} and schema.keys() <= _OF_NO_CONSEQUENCE:
        return _NO_ARGUMENTS
    return {**schema, "type": "object"}
