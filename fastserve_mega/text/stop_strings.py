"""Find stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence

MAX_STOPS = 128
MAX_STOP_LENGTH = 4096
_LONGEST_VALUE = 60


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
        stops: the stop strings, see `stop_strings`; with none of them all text passes at once.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._matchers = [_Matcher(stop) for stop in stops]
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
        if not self._matchers:
            return piece
        text = self._held + piece
        for position, character in enumerate(piece, start=len(self._held) + 1):
            complete = [m.stop for m in self._matchers if m.advance(character)]
            if complete and may_stop:
                self.matched = max(complete, key=len)
                self._held = ""
                return text[: position - len(self.matched)]
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
