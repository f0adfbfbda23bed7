"""Calls as the Llama 3 family writes them: the whole answer is {"name": …, "parameters": …}."""

from __future__ import annotations

import json
from collections.abc import Sequence

from fastserve_mega.server.tools.pieces import Piece, parse_call

_TAG = "<|python_tag|>"
_SEPARATORS = "; \n\t\r"


class Llama3JsonParser:
    """An answer that begins with a brace is held back to its end, and is calls if all of it is."""

    is_forced = False

    def __init__(self) -> None:
        self._text = ""
        self._is_content = False

    def push(self, text: str) -> Sequence[Piece]:
        if self._is_content:
            return [text] if text else []
        self._text += text
        begin = self._text.lstrip()
        if not begin or _TAG.startswith(begin) or begin.startswith(("{", _TAG)):
            return []
        self._is_content = True
        return [self._text]

    def finish(self) -> Sequence[Piece]:
        if self._is_content or not self._text:
            return []
        return self._calls() or [self._text]

    def _calls(self) -> list[Piece]:
        """All calls, separated by semicolons; none when anything else is in between."""
        text = self._text.strip().removeprefix(_TAG)
        decoder = json.JSONDecoder()
        calls: list[Piece] = []
        position = 0
        try:
            while rest := text[position:].lstrip(_SEPARATORS):
                value, end = decoder.raw_decode(rest)
                position = len(text) - len(rest) + end
                if (call := parse_call(value, len(calls))) is None:
                    return []
                calls.append(call)
        except (ValueError, RecursionError):
            return []
        return calls
