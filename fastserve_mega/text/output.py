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
        min_tokens: a stop string that is complete within so many tokens is text like any other.
    """

    def __init__(
        self,
        decoder: TokenDecoder,
        stops: Sequence[str] = (),
        silent: Collection[int] = (),
        min_tokens: int = 0,
    ) -> None:
        self._detokenizer = Detokenizer(decoder)
        self._filter = StopStringFilter(stops)
        self._silent = frozenset(silent)
        self._held_to_run = min_tokens
        """Output tokens that are still to come before a stop string counts."""

    @property
    def stopped(self) -> bool:
        """A stop string was found; the rest of the answer does not matter."""
        return self._filter.matched is not None

    def push(self, token_ids: Sequence[int]) -> str:
        """Add output tokens; returns the text that is now certain."""
        before = min(len(token_ids), self._held_to_run)
        self._held_to_run -= before
        text = self._push(token_ids[:before], may_stop=False) if before else ""
        return text + self._push(token_ids[before:], may_stop=True)

    def _push(self, token_ids: Sequence[int], *, may_stop: bool) -> str:
        spoken = [token for token in token_ids if token not in self._silent]
        return self._filter.push(self._detokenizer.push(spoken), may_stop=may_stop)

    def flush(self) -> str:
        """The rest of the text, when no more tokens will come."""
        rest = self._filter.push(self._detokenizer.flush(), may_stop=not self._held_to_run)
        return rest + self._filter.flush()
