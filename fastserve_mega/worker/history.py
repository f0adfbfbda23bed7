"""The tokens of a sequence, where what is sampled next depends on them. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from fastserve_mega.worker.grammar import Compilation

_FIRST_CAPACITY = 64


class TokenCounts:
    """How often each token occurs in the output; tokens of the prompt alone count 0.

    Kept as arrays that grow, so that a step reads them without a loop over tokens.
    """

    def __init__(self, prompt: Sequence[int] = ()) -> None:
        known = list(dict.fromkeys(prompt))
        self._slots = {token: slot for slot, token in enumerate(known)}
        capacity = max(2 * len(known), _FIRST_CAPACITY)
        self._ids = np.zeros(capacity, dtype=np.int64)
        self._ids[: len(known)] = known
        self._counts = np.zeros(capacity, dtype=np.float32)

    @property
    def ids(self) -> NDArray[np.int64]:
        """Each token once, in order of appearance."""
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> NDArray[np.float32]:
        """Occurrences in the output of each of `ids`."""
        return self._counts[: len(self._slots)]

    def add(self, tokens: Sequence[int]) -> None:
        """Count output tokens."""
        for token in tokens:
            slot = self._slots.setdefault(token, len(self._slots))
            if slot == len(self._ids):
                self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
                self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
            self._ids[slot] = token
            self._counts[slot] += 1


class TokenHistory:
    """The output of one sequence so far, put together from the slices of the plans.

    It does not depend on how often the sequence was preempted or recomputed: a slice adds what
    is new in it, and nothing else.

    Args:
        prompt_tokens: length of the prompt.
        prompt: its tokens; empty when nothing depends on them.
        output: tokens from before the first slice.
    """

    def __init__(
        self, prompt_tokens: int, prompt: Sequence[int] = (), output: Sequence[int] = ()
    ) -> None:
        self._prompt_tokens = prompt_tokens
        self.prompt = tuple(prompt)
        """Empty where nothing depends on it."""
        self.output = list(output)
        self.compilation: Compilation | None = None
        """Its compiled grammar, which knows where in it the output stands; the sampler's."""
        self.counts = TokenCounts(prompt)
        self.counts.add(output)

    def follow(self, start: int, token_ids: Sequence[int]) -> None:
        """Take over what is new in a slice.

        Args:
            start: position of the slice's first token.
            token_ids: of the slice.

        Raises:
            ValueError: tokens between the known ones and the slice are missing.
        """
        known = self._prompt_tokens + len(self.output) - start
        if known < 0:
            raise ValueError(f"{-known} tokens before position {start} are missing")
        if new := token_ids[known:]:
            self.output.extend(new)
            self.counts.add(new)
