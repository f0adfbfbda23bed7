"""Calls as Hermes, Qwen 2.5 and Qwen 3 write them: <tool_call>{"name": …}</tool_call>."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastserve_mega.server.tools.call_reader import CallReader
from fastserve_mega.server.tools.pieces import Piece, held_back

_BEGIN = "<tool_call>"
_END = "</tool_call>"
_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
"""Whole ones of JSON."""


class HermesParser:
    """Calls may follow each other, before, between and after text."""

    is_forced = False

    def __init__(self) -> None:
        self._text = ""
        """Not told yet: it may be the beginning of a mark, or space before a call."""
        self._call: CallReader | None = None
        self._mark = _BEGIN
        """What the call that is being read began with, space before it included."""
        self._body = ""
        """Its text, in case it is none."""
        self._calls = 0

    def push(self, text: str) -> Sequence[Piece]:
        self._text += text
        pieces: list[Piece] = []
        while True:
            marks = (_BEGIN,) if self._call is None else (_BEGIN, _END)
            found = min(filter(self._text.__contains__, marks), key=self._text.index, default=None)
            if found is None:
                break
            before, _, self._text = self._text.partition(found)
            if self._call is None:
                content = before.rstrip()
                pieces += self._content(content)
                self._begin(before[len(content) :] + _BEGIN)
                continue
            pieces += self._read(self._call, before)
            if _is_in_string(self._body):
                pieces += self._read(self._call, found)  # an argument may have the mark in it
            elif found == _END:
                pieces += self._end_call(self._call, _END)
            else:
                # Some models begin the next call instead of ending one.
                pieces += self._end_call(self._call, "")
                self._begin(_BEGIN)
        certain = len(self._text) - max(held_back(self._text, mark) for mark in marks)
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
        pieces = [*self._read(self._call, text), *self._end_call(self._call, "")]
        if pieces == [f"{self._mark}{self._body}"] and _END in self._body:
            # No call, and so no JSON, whose strings the marks could be in.
            before, _, after = self._body.partition(_END)
            pieces = [f"{self._mark}{before}{_END}", *self.push(after), *self.finish()]
        return pieces

    def _content(self, text: str) -> list[Piece]:
        """Text around calls; the space that sets them apart is no part of it."""
        return [text] if text and not (self._calls and text.isspace()) else []

    def _begin(self, mark: str) -> None:
        self._call, self._mark, self._body = CallReader(self._calls), mark, ""

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
            return [f"{self._mark}{self._body}{end}"]
        self._calls += 1
        return [whole]


def _is_in_string(text: str) -> bool:
    """Whether JSON that goes on after a text is within a string there."""
    return '"' in _STRINGS.sub("", text)
