"""Calls that the request insists on: the output is held to their form, whatever the model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastserve_mega.server.tools.pieces import CallPiece, Piece, parse_call

_ANY_ARGUMENTS: dict[str, Any] = {"type": "object"}
Functions = Mapping[str, dict[str, Any] | None]
"""Name of each function to the JSON schema of its arguments."""


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
    """The whole answer is an array of {"name": …, "arguments": …}; each is told when complete."""

    is_forced = False

    def __init__(self) -> None:
        self._text = ""
        self._calls = 0
        self._decoder = json.JSONDecoder()

    def push(self, text: str) -> Sequence[Piece]:
        self._text += text
        return list(self._complete_calls()) if "}" in text else []

    def finish(self) -> Sequence[Piece]:
        return []

    def _complete_calls(self) -> Iterator[Piece]:
        while rest := self._text.lstrip("[, \n\t\r"):
            try:
                value, end = self._decoder.raw_decode(rest)
            except (ValueError, RecursionError):
                return
            self._text = rest[end:]
            if (call := parse_call(value, self._calls)) is not None:
                self._calls += 1
                yield call


def named_schema(functions: Functions, name: str) -> dict[str, Any]:
    """What `NamedCall` reads: the arguments of one function."""
    return functions[name] or _ANY_ARGUMENTS


def required_schema(functions: Functions, *, several: bool) -> dict[str, Any]:
    """What `RequiredCalls` reads.

    Raises:
        ValueError: two functions define different things under one name in `$defs`.
    """
    definitions: dict[str, Any] = {}
    calls = []
    for name, parameters in functions.items():
        schema = dict(parameters or _ANY_ARGUMENTS)
        # References are by their path from the top.
        for key, definition in schema.pop("$defs", {}).items():
            if definitions.setdefault(key, definition) != definition:
                raise ValueError(f"two tools define {key!r} differently in $defs")
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": schema},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    array = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    limit = {} if several else {"maxItems": 1}
    return {**array, **limit, **({"$defs": definitions} if definitions else {})}
