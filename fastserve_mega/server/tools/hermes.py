"""Calls as Hermes, Qwen 2.5 and Qwen 3 write them: <tool_call>{"name": …}</tool_call>."""

from __future__ import annotations

import json
from collections.abc import Sequence

from fastserve_mega.server.tools.pieces import Piece, held_back, parse_call

_BEGIN = "<tool_call>"
_END = "</tool_call>"


class HermesParser:
    """Calls may follow each other, before, between and after text."""

    is_forced = False

    def __init__(self) -> None:
        self._text = ""
        """Not told yet: inside a call, or it may be the beginning of one."""
        self._in_call = False
        self._calls = 0

    def push(self, text: str) -> Sequence[Piece]:
        self._text += text
        pieces: list[Piece] = []
        while True:
            marker = _END if self._in_call else _BEGIN
            before, found, after = self._text.partition(marker)
            if not found:
                break
            pieces += self._call(before) if self._in_call else self._content(before, at_call=True)
            self._text, self._in_call = after, not self._in_call
        if not self._in_call:
            certain = len(self._text) - held_back(self._text, _BEGIN)
            certain = len(self._text[:certain].rstrip())
            pieces += self._content(self._text[:certain])
            self._text = self._text[certain:]
        return pieces

    def finish(self) -> Sequence[Piece]:
        text, self._text = self._text, ""
        # Some models end their answer instead of the call.
        return self._call(text, end="") if self._in_call else self._content(text)

    def _content(self, text: str, *, at_call: bool = False) -> list[Piece]:
        """Text around calls; the space that sets it apart from them is no part of it."""
        if at_call:
            text = text.rstrip()
        if self._calls and not text.strip():
            return []
        return [text] if text else []

    def _call(self, body: str, end: str = _END) -> list[Piece]:
        try:
            call = parse_call(json.loads(body), self._calls)
        except (ValueError, RecursionError):
            call = None
        if call is None:
            # What is not a call is content, as the model wrote it.
            return [f"{_BEGIN}{body}{end}"]
        self._calls += 1
        return [call]
