"""How much KV the started requests will come to, answers that are still to come included."""

from __future__ import annotations

import math

_FIRST_GUESS_TOKENS = 128.0
"""Length of an answer before any has ended."""
_MEMORY = 200
"""Answers over which their length is averaged."""
_MARGIN_IN_BATCH = 0.5
_MARGIN_BEYOND = 3.0
"""Standard deviations kept free, since lengths differ. While all that is started fits into a batch,
an empty place in it costs more than to compute some KV again now and then; beyond, nothing is
lost by waiting."""


class KvProjection:
    """Predicts the peak of the KV of requests that run together, from the answers before.

    Each of them is taken to get R more tokens, uniform between 0 and twice the mean length m of
    an answer. After t tokens more, a share of 1 - t/2m of them is left, with t tokens more than
    their mean c of now: together (1 - t/2m)(c + t), which is largest at t = m - c/2 and then is
    (2m + c)² / 8m. Where c is above 2m more KV comes free than is added, and the peak is now.
    """

    def __init__(self, max_batch_size: int) -> None:
        self._max_batch_size = max_batch_size
        self._tokens = _FIRST_GUESS_TOKENS
        self._answers = 1.0

    def observe(self, tokens: int, answers: int) -> None:
        """Learn from a step.

        Tokens for each answer that ended is the mean length also while most are under way (the
        estimate for censored lifetimes): of answers that share their time the short ones end
        first, and a mean over those alone would be far too low.

        Args:
            tokens: sampled.
            answers: that ended with one of them.
        """
        self._tokens += tokens
        if answers:
            kept = max(1.0 - answers / _MEMORY, 0.0)
            self._tokens *= kept
            self._answers = self._answers * kept + answers

    @property
    def mean_tokens(self) -> float:
        """Length of an answer."""
        return self._tokens / self._answers

    def peak_tokens(self, requests: int, tokens: float, max_tokens: int) -> float:
        """Predict the largest amount of KV, with a margin.

        Args:
            requests: that are started, at least one.
            tokens: whose KV they have now, all together.
            max_tokens: the longest answer that they may ask for.
        """
        mean = min(self.mean_tokens, max_tokens)
        now = tokens / requests
        peak = now if now >= 2 * mean else (2 * mean + now) ** 2 / (8 * mean)
        margin = _MARGIN_IN_BATCH if requests <= self._max_batch_size else _MARGIN_BEYOND
        # The standard deviation of a uniform distribution of this mean is mean / √3.
        return requests * peak + margin * math.sqrt(requests / 3) * mean
