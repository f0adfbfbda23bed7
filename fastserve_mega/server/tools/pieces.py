"""What the readers of answers have in common."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class CallPiece:
    """A tool call, or the next part of its arguments."""

    index: int
    """Number of the call within the answer."""
    name: str | None
    """Given with the first piece of a call."""
    arguments: str
    """JSON text, to be put together from all pieces of the call."""


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A part of what the model thinks before it answers."""

    text: str


Piece = str | Reasoning | CallPiece
"""Content is a plain string."""


Functions = Mapping[str, dict[str, Any] | None]
"""Name of each function to the JSON schema of its arguments."""


class ToolParser(Protocol):
    """Takes the text of one answer as it comes, and tells calls and reasoning from content."""

    is_forced: bool
    """The request has named the function to call; that it is called is no news then."""

    def push(self, text: str) -> Sequence[Piece]:
        """What is now certain."""

    def finish(self) -> Sequence[Piece]:
        """The rest, when no more text will come."""


class PlainText:
    """Everything is content."""

    is_forced = False

    def push(self, text: str) -> Sequence[Piece]:
        return [text] if text else []

    def finish(self) -> Sequence[Piece]:
        return []


PLAIN_TEXT = PlainText()
"""One for all answers: it remembers nothing."""


def parse_call(value: Any, index: int) -> CallPiece | None:
    """A whole call from its JSON, or None when it is something else.

    Models write {"name": …, "arguments": {…}}; those of the Llama 3 family say "parameters". Some
    write null for no arguments, or the object as a text, as OpenAI's API has it.
    """
    if not isinstance(value, dict) or not isinstance(name := value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        with suppress(ValueError):
            arguments = json.loads(arguments)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        return None
    return CallPiece(index, name, json.dumps(arguments, ensure_ascii=False))


def held_back(text: str, *markers: str) -> int:
    """How many characters at the end of a text may be the beginning of a marker."""
    for length in range(min(len(text), max(map(len, markers)) - 1), 0, -1):
        if any(len(each) > length and text.endswith(each[:length]) for each in markers):
            return length
    return 0
