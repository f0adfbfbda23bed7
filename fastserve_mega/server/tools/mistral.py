"""Calls as Mistral's models write them: [TOOL_CALLS] and a list, or NAME[ARGS]{…}."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from fastserve_mega.server.tools.call_reader import CallReader
from fastserve_mega.server.tools.forced import RequiredCalls
from fastserve_mega.server.tools.pieces import CallPiece, Piece, held_back

MARKS = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
_BEGIN = MARKS[0]
_NAME = re.compile(r"\s*([\w.-]+?)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\])?\s*(?=\{)")


class MistralParser:
    """Content comes first, then calls."""

    is_forced = False

    def __init__(self) -> None:
        self._text = ""
        """Not told yet."""
        self._in_calls = False
        self._list: RequiredCalls | None = None
        self._call: CallReader | None = None
        self._calls = 0
        self._mark = _BEGIN
        """The first mark, space before it included."""
        self._body = ""
        """All text after it, in case it is no call."""

    def push(self, text: str) -> Sequence[Piece]:
        self._text += text
        if self._in_calls:
            self._body += text
            return self._read()
        before, found, after = self._text.partition(_BEGIN)
        if found:
            self._in_calls, self._text, self._body = True, after, after
            content = before.rstrip()
            self._mark = before[len(content) :] + _BEGIN
            return [*([content] if content else []), *self._read()]
        certain = len(self._text) - held_back(self._text, _BEGIN)
        certain = len(self._text[:certain].rstrip())
        new, self._text = self._text[:certain], self._text[certain:]
        return [new] if new else []

    def finish(self) -> Sequence[Piece]:
        text, self._text = self._text, ""
        if self._in_calls:
            # What is not a call is content, as the model wrote it.
            return [] if self._calls else [self._mark + self._body]
        return [text] if text else []

    def _read(self) -> list[Piece]:
        if (
            self._list is None
            and self._call is None
            and self._text.lstrip().startswith(("[{", "[ "))
        ):
            self._list = RequiredCalls()
        if self._list is not None:
            text, self._text = self._text, ""
            pieces = list(self._list.push(text))
            self._calls += sum(isinstance(p, CallPiece) and p.name is not None for p in pieces)
            return pieces
        return self._named_calls()

    def _named_calls(self) -> list[Piece]:
        pieces: list[Piece] = []
        while self._text:
            if self._call is None:
                text = self._text.lstrip("; \n").removeprefix(_BEGIN)
                if (match := _NAME.match(text)) is None:
                    break
                self._call = CallReader(self._calls)
                self._calls += 1
                # As if it were the other form.
                head = f'{{"name": {json.dumps(match[1])}, "arguments": '
                self._call.push(head)
                text = text[match.end() :]
                pieces += self._call.push(text)
            else:
                pieces += self._call.push(self._text)
            self._text = self._call.rest
            if not self._call.complete:
                break
            self._call = None
        return pieces
