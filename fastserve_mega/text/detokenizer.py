"""Token ids to text, a few at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
"""What bytes that are not (or not yet) a character decode to."""
MAX_HELD = 3
"""A cut UTF-8 sequence has at most three bytes, so at most this many replacements are in doubt."""
SHIFT_AT = 16
"""Tokens in the window before its start moves up."""
MAX_WINDOW = 64
"""Tokens in the window before its start moves up even in the middle of a character."""


class TokenDecoder(Protocol):
    """What the detokenizer needs of a tokenizer."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the ids, special ones skipped."""

    def visible(self, token_ids: Sequence[int]) -> list[int]:
        """Those of the ids that stand for text."""


class Detokenizer:
    """Turns a growing list of token ids into text deltas.

    A character whose bytes are spread over tokens comes out when it is complete. The deltas of a
    byte-level tokenizer, `flush()` included, concatenate to the decoding of all ids at once.

    Each call decodes a bounded window of the last tokens, not the whole answer. The window starts
    where a character starts, and keeps tokens that are out already as context, since decoders
    treat the very first token in a special way (they strip its space).
    """

    def __init__(self, decoder: TokenDecoder) -> None:
        self._decoder = decoder
        self._window: list[int] = []
        self._emitted = 0
        """Characters of the window's text that are out."""
        self._aligned = 0
        """Tokens of the window up to the last point known to lie between two characters."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Add output tokens; returns the text that is now certain."""
        visible = self._decoder.visible(token_ids)
        if not visible:
            return ""
        self._window.extend(visible)
        text = self._decoder.decode(self._window)
        certain = len(text) - _count_in_doubt(text)
        delta = text[self._emitted : certain]
        self._emitted = max(self._emitted, certain)
        self._shift(text)
        return delta

    def flush(self) -> str:
        """The text held back, when no more tokens will come."""
        delta = self._decoder.decode(self._window)[self._emitted :]
        self._window = []
        self._emitted = self._aligned = 0
        return delta

    def _shift(self, text: str) -> None:
        """Move the window's start up, to bound the work of the next call."""
        held = len(text) - self._emitted
        if held <= 0:
            if len(self._window) >= SHIFT_AT and self._aligned > 0:
                self._restart(self._window[self._aligned :], held=0)
            self._aligned = len(self._window)
        elif len(self._window) > MAX_WINDOW:
            # No token has ended with a character for long. UTF-8 finds its way again after at
            # most three bytes, so the tail of the text is the same from a start inside one.
            self._restart(self._window[-SHIFT_AT:], held)
            self._aligned = 0

    def _restart(self, window: list[int], held: int) -> None:
        self._window = window
        self._emitted = max(0, len(self._decoder.decode(window)) - held)


def _count_in_doubt(text: str) -> int:
    """Replacements at the end that more bytes may still turn into a character."""
    return min(len(text) - len(text.rstrip(REPLACEMENT)), MAX_HELD)
