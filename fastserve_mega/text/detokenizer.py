"""Output tokens to the text of one answer: whole characters, up to the first stop string."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

REPLACEMENT = "\ufffd"
"""What bytes that are not (or not yet) a character decode to."""
MAX_HELD = 3
"""A cut UTF-8 sequence has at most three bytes, so at most this many replacements are in doubt."""
SHIFT_AT = 16
"""Tokens in the window before its start moves up."""
MAX_WINDOW = 64
"""Tokens in the window before its start moves up even in the middle of a character."""
_MOST_CONTEXT = 8
"""Tokens of a prompt that are looked at for the beginning of a character."""
MAX_STOPS = 128
MAX_STOP_LENGTH = 4096
_LONGEST_VALUE = 60
"""Characters of a wrong value that an error shows."""


class TokenDecoder(Protocol):
    """What the detokenizer needs of a tokenizer."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the ids, special ones skipped."""

    def visible(self, token_ids: Sequence[int]) -> list[int]:
        """The ids that stand for text."""


class Detokenizer:
    """Turns the growing list of an answer's token ids into text deltas, up to a stop string.

    A character whose bytes are spread over tokens comes out when it is complete. The deltas of a
    byte-level tokenizer, `flush()` included, concatenate to the decoding of all ids at once.

    Each call decodes a bounded window of the last tokens, not the whole answer. The window starts
    where a character starts, and keeps tokens that are out already as context, since decoders
    treat the very first token in a special way (they strip its space).

    Args:
        decoder: the model's tokenizer.
        stops: stop strings; the text ends before the first one.
        silent: token ids that end an answer and are not part of its text.
        min_tokens: a stop string that is complete within so many tokens is text like any other.
        stop_tokens: stop strings that are special tokens, which no text shows, by their ids.
        tells_stop: the stop string, or stop token, that ends the answer is part of its text.
    """

    def __init__(
        self,
        decoder: TokenDecoder,
        stops: Sequence[str] = (),
        silent: Collection[int] = (),
        min_tokens: int = 0,
        stop_tokens: Mapping[int, str] = MappingProxyType({}),
        *,
        tells_stop: bool = False,
    ) -> None:
        self._decoder = decoder
        self._filter = StopStringFilter(stops, tells_stop=tells_stop) if stops else None
        self.stopped_by: str | None = None
        """The stop string that ended the text."""
        self._silent = frozenset() if tells_stop else frozenset(silent)
        self._tells_stop = tells_stop
        self._stop_tokens = stop_tokens
        self._held_to_run = min_tokens
        """Output tokens that are still to come before a stop string counts."""
        self._window: list[int] = []
        self._emitted = 0
        """Characters of the window's text that are out."""
        self._aligned = 0
        """Tokens of the window up to the last point known to lie between two characters."""

    def follow(self, prompt: Sequence[int]) -> None:
        """Take the end of a prompt as context of the answer, which goes on with its text."""
        for length in range(1, min(len(prompt), _MOST_CONTEXT) + 1):
            window = self._decoder.visible(prompt[-length:])
            text = self._decoder.decode(window)
            # Not from within a character, nor from a space that is left out.
            if text and REPLACEMENT not in text:
                self._window, self._emitted, self._aligned = window, len(text), len(window)
                return

    @property
    def stopped(self) -> bool:
        """A stop string was found; the rest of the answer does not matter."""
        return self.stopped_by is not None

    def push(self, token_ids: Sequence[int]) -> str:
        """Add output tokens; returns the text that is now certain."""
        before = min(len(token_ids), self._held_to_run)
        self._held_to_run -= before
        text = self._push(token_ids[:before], may_stop=False) if before else ""
        return text + self._push(token_ids[before:], may_stop=True)

    def flush(self) -> str:
        """The rest of the text, when no more tokens will come."""
        rest = self._decoder.decode(self._window)[self._emitted :]
        self._window = []
        self._emitted = self._aligned = 0
        text = self._until_stop(rest, may_stop=not self._held_to_run)
        return text + self._filter.flush() if self._filter else text

    def _push(self, token_ids: Sequence[int], *, may_stop: bool) -> str:
        for position, token in enumerate(token_ids if may_stop else ()):
            if (stop := self._stop_tokens.get(token)) is not None:
                text = self._push(token_ids[:position], may_stop=True) + self.flush()
                if not self.stopped:
                    self.stopped_by = stop
                    text += stop if self._tells_stop else ""
                return text
        spoken = [token for token in token_ids if token not in self._silent]
        return self._until_stop(self._decode(spoken), may_stop=may_stop)

    def _until_stop(self, text: str, *, may_stop: bool) -> str:
        if self.stopped:
            return ""
        if self._filter is not None:
            text = self._filter.push(text, may_stop=may_stop)
            self.stopped_by = self._filter.matched
        return text

    def _decode(self, token_ids: Sequence[int]) -> str:
        """Add tokens to the window; returns the characters that are now complete."""
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


def stop_strings(stop: object) -> tuple[str, ...]:
    """What a caller gives as `stop`, as stop strings: none, one, or a list of them.

    Raises:
        ValueError: it is something else, or too much; one sentence with the value and the limit.
    """
    if stop is None:
        return ()
    if not isinstance(stop, str | list | tuple):
        raise ValueError(f"stop must be a string or a list of strings, got {_short(stop)}")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MAX_STOPS:
        raise ValueError(f"stop must have at most {MAX_STOPS} strings, got {len(stops)}")
    for each in stops:
        if not isinstance(each, str):
            raise ValueError(f"stop must be a string or a list of strings, got {_short(stop)}")
        if not 1 <= len(each) <= MAX_STOP_LENGTH:
            told = "must not be empty" if not each else f"has {len(each)} characters"
            raise ValueError(f"a stop string {told}: it has 1 to {MAX_STOP_LENGTH} characters")
    return stops


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."


class StopStringFilter:
    """Passes text on until a stop string is complete; the stop string itself is not passed on.

    The stop string that is complete first ends the text; of several complete at the same
    character, the longest. So the result does not depend on how the text was cut into pieces.
    Text that may be the beginning of a stop string is held back until that is decided.

    Args:
        stops: the stop strings, see `stop_strings`; at least one.
        tells_stop: the one that ends the text is passed on, too.
    """

    def __init__(self, stops: Sequence[str], *, tells_stop: bool = False) -> None:
        self._matchers = [_Matcher(stop) for stop in stops]
        self._tells_stop = tells_stop
        self._held = ""
        self.matched: str | None = None
        """The stop string that ended the text."""

    def push(self, piece: str, *, may_stop: bool = True) -> str:
        """Add text; returns what can be passed on. After a match that is nothing.

        A stop string that is complete in a piece that may not stop the text is text like any
        other.
        """
        if self.matched is not None:
            return ""
        text = self._held + piece
        for position, character in enumerate(piece, start=len(self._held) + 1):
            complete = [m.stop for m in self._matchers if m.advance(character)]
            if complete and may_stop:
                self.matched = max(complete, key=len)
                self._held = ""
                return text[: position - (0 if self._tells_stop else len(self.matched))]
        keep = len(text) - max(matcher.length for matcher in self._matchers)
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """The text held back, when no more will come."""
        held, self._held = self._held, ""
        return held


class _Matcher:
    """Knuth-Morris-Pratt search for one string, a character at a time."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.length = 0
        """Characters of `stop` that the text so far ends with."""
        self._fallback = _fallbacks(stop)

    def advance(self, character: str) -> bool:
        """True when the text, with this character, ends with the stop string."""
        while self.length and self.stop[self.length] != character:
            self.length = self._fallback[self.length - 1]
        if self.stop[self.length] == character:
            self.length += 1
        if self.length < len(self.stop):
            return False
        self.length = self._fallback[-1]
        return True


def _fallbacks(stop: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    table = [0] * len(stop)
    length = 0
    for index in range(1, len(stop)):
        while length and stop[index] != stop[length]:
            length = table[length - 1]
        if stop[index] == stop[length]:
            length += 1
        table[index] = length
    return table
