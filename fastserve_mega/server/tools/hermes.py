"""Calls as Hermes, Qwen 2.5 and Qwen 3 write them: <tool_call>{"name": …}</tool_call>."""

from __future__ import annotations

from collections.abc import Sequence

from fastserve_mega.server.tools.call_reader import CallReader
from fastserve_mega.server.tools.pieces import Piece, held_back

_BEGIN = "<tool_call>"
_END = "</tool_call>"


class HermesParser:
    """Calls may follow each other, before, between and after text."""

    is_forced = False

    def __init__(self) -> None:
        self._text = ""
        """Not told yet: it may be the beginning of a mark, or space before a call."""
        self._call: CallReader | None = None
        self._body = ""
        """Text of the call that is being read, in case it is none."""
        self._calls = 0

    def push(self, text: str) -> Sequence[Piece]:
        self._text += text
        pieces: list[Piece] = []
        while True:
            marker = _BEGIN if self._call is None else _END
            before, found, after = self._text.partition(marker)
            if not found:
                break
            self._text = after
            if self._call is None:
                pieces += self._content(before.rstrip())
                self._call, self._body = CallReader(self._calls), ""
            else:
                pieces += [*self._read(self._call, before), *self._end_call(self._call, _END)]
        certain = len(self._text) - held_back(self._text, marker)
        if self._call is None:
            certain = len(self._text[:certain].rstrip())
        new, self._text = self._text[:certain], self._text[certain:]
        return [
            *pieces,
            *(self._content(new) if self._call is None else self._read(self._call, new)),
        ]

    def finish(self) -> Sequence[Piece]:
        text, self._text = self._text, ""
        if self._call is None:
            return self._content(text)
        # Some models end their answer instead of the call.
        return [*self._read(self._call, text), *self._end_call(self._call, "")]

    def _content(self, text: str) -> list[Piece]:
        """Text around calls; the space that sets them apart is no part of it."""
        return [text] if text and not (self._calls and text.isspace()) else []

    def _read(self, call: CallReader, body: str) -> Sequence[Piece]:
        self._body += body
        return call.push(body)

    def _end_call(self, call: CallReader, end: str) -> list[Piece]:
        self._call = None
        if call.begun:
            self._calls += 1
            return []
        if (whole := call.finish()) is None:
            # What is not a call is content, as the model wrote it.
            return [f"{_BEGIN}{self._body}{end}"]
        self._calls += 1
        return [whole]
