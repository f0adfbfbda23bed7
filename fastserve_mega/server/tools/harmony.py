"""Answers as gpt-oss writes them: messages in channels, of which one is reasoning.

<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…
<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{…}
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastserve_mega.server.tools.pieces import CallPiece, Piece, Reasoning, held_back

_START, _MESSAGE, _CHANNEL = "<|start|>", "<|message|>", "<|channel|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>", _START)
MARKS = (*_ENDS, _MESSAGE, _CHANNEL, "<|constrain|>")
_ANY_END = re.compile("|".join(map(re.escape, _ENDS)))
_HEADS = (_CHANNEL, *_ENDS, "assistant", "to=")
"""What a header begins with; the prompt ends within the first one."""
_RECIPIENT = re.compile(r"to=functions\.([\w.-]+)")


class HarmonyParser:
    """Reasoning is the channel `analysis`; a message to a function is a call; the rest is content.

    Args:
        tells_reasoning: apart from content.
    """

    is_forced = False

    def __init__(self, *, tells_reasoning: bool = True) -> None:
        self._tells_reasoning = tells_reasoning
        self._text = ""
        """Not told yet."""
        self._header: str | None = None
        """Header of the message that is being read; None between messages."""
        self._calls = 0
        self._is_plain = False

    def push(self, text: str) -> Sequence[Piece]:
        if self._is_plain:
            return [text] if text else []
        self._text += text
        pieces: list[Piece] = []
        while True:
            if self._header is None:
                if not self._take_header(pieces):
                    return pieces
            elif not self._take_body(pieces):
                return pieces

    def finish(self) -> Sequence[Piece]:
        text, self._text = self._text, ""
        if self._header is not None:
            return self._told(text)
        # A header that is cut tells nothing.
        return [text] if text.strip() and not any(mark in text for mark in MARKS) else []

    def _take_header(self, pieces: list[Piece]) -> bool:
        header, found, after = self._text.partition(_MESSAGE)
        if found:
            self._header, self._text = header, after
            if match := _RECIPIENT.search(header):
                pieces.append(CallPiece(self._calls, match[1], ""))
                self._calls += 1
            return True
        begin = self._text.lstrip()
        if not any(begin.startswith(each) or each.startswith(begin) for each in _HEADS):
            # Output that is held to a form has no headers.
            self._is_plain, self._text = True, ""
            pieces.append(begin)
        return False

    def _take_body(self, pieces: list[Piece]) -> bool:
        if match := _ANY_END.search(self._text):
            pieces += self._told(self._text[: match.start()])
            self._text, self._header = self._text[match.end() :], None
            return True
        certain = len(self._text) - held_back(self._text, *_ENDS)
        new, self._text = self._text[:certain], self._text[certain:]
        pieces += self._told(new)
        return False

    def _told(self, text: str) -> list[Piece]:
        header = self._header or ""
        if not text:
            return []
        if _RECIPIENT.search(header):
            return [CallPiece(self._calls - 1, None, text)]
        if "analysis" in header and self._tells_reasoning:
            return [Reasoning(text)]
        return [text]
