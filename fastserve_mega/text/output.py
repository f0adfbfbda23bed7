"""The text of one answer: detokenizer and stop strings in a row."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fastserve_mega.text.detokenizer import Detokenizer, TokenDecoder
from fastserve_mega.text.stop_strings import StopStringFilter


class OutputText:
    """Output tokens in, text deltas out.

    Args:
        decoder: the model's tokenizer.
        stops: stop strings; the text ends before the first one.
        silent: token ids that end an answer and are not part of its text.
    """

    def __init__(
        self, decoder: TokenDecoder, stops: Sequence[str] = (), silent: Collection[int] = ()
    ) -> None:
        self._detokenizer = Detokenizer(decoder)
        self._filter = StopStringFilter(stops)
        self._silent = frozenset(silent)

    @property
    def stopped(self) -> bool:
        """A stop string was found; the rest of the answer does not matter."""
        return self._filter.matched is not None

    def push(self, token_ids: Sequence[int]) -> str:
        """Add output tokens; returns the text that is now certain."""
        spoken = [token for token in token_ids if token not in self._silent]
        return self._filter.push(self._detokenizer.push(spoken))

    def flush(self) -> str:
        """The rest of the text, when no more tokens will come."""
        rest = self._filter.push(self._detokenizer.flush())
        return rest + self._filter.flush()
