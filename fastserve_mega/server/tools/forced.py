"""Calls that the request insists on: the output is held to their form, whatever the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastserve_mega.server.tools.call_reader import CallReader
from fastserve_mega.server.tools.pieces import CallPiece, Functions, Piece

_ANY_ARGUMENTS: dict[str, Any] = {"type": "object"}


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
