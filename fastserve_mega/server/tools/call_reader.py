"""Reads one call, {"name": …, "arguments": {…}}, while it is being written."""

from __future__ import annotations

import json
import re

from fastserve_mega.server.tools.pieces import CallPiece, parse_call

_HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)


class CallReader:
    """Tells the name as soon as it is certain, and then the arguments as they come.

    Args:
        index: of the call within the answer.
    """

    def __init__(self, index: int) -> None:
        self._index = index
        self._text = ""
        """All of the call so far."""
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.begun = False
        """The name is told."""
        self.complete = False
        """The arguments are told to their end."""
        self.rest = ""
        """What came behind the arguments, in the piece that completed them."""

    def push(self, text: str) -> list[CallPiece]:
        """What is new and certain."""
        self._text += text
        if self.complete:
            return []
        pieces = []
        if not self.begun:
            if (head := _HEAD.match(self._text)) is None:
                return []
            self.begun = True
            pieces.append(CallPiece(self._index, str(json.loads(head[1], strict=False)), ""))
            text = self._text[head.end() :]
        if arguments := self._arguments(text):
            pieces.append(CallPiece(self._index, None, arguments))
        return pieces

    def finish(self) -> CallPiece | None:
        """A whole call that was written in another order, if it is one; else None."""
        try:
            return parse_call(json.loads(self._text), self._index)
        except (ValueError, RecursionError):
            return None

    def _arguments(self, text: str) -> str:
        """As much of the text as belongs to the arguments: up to the brace that closes them."""
        for position, character in enumerate(text, start=1):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{}":
                self._depth += 1 if character == "{" else -1
                if self._depth == 0:
                    self.complete = True
                    self.rest = text[position:]
                    return text[:position]
        return text
