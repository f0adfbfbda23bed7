"""Holds sampling to a grammar: which tokens may come next, after the output so far."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastserve_mega.text.structured import GrammarUnavailableError, grammar_of, load_llguidance
from fastserve_mega.types import StructuredOutput
from fastserve_mega.worker.history import TokenHistory

_LONGEST_MESSAGE = 300


class GrammarError(Exception):
    """One request's grammar cannot be followed; str() is one sentence."""


class GrammarMatcher:
    """One output's way through its grammar. It depends on the output tokens only.

    Args:
        tokenizer: of llguidance.
        grammar: in llguidance's form.

    Raises:
        GrammarError: (all methods) the grammar is not valid, too complex, or was left.
    """

    def __init__(self, tokenizer: Any, grammar: str) -> None:
        self._matcher = load_llguidance().LLMatcher(tokenizer, grammar, log_level=0)
        self._followed = 0
        self._check()

    def follow(self, output: Sequence[int]) -> None:
        """Take over what is new in the whole output so far."""
        new = list(output[self._followed :])
        self._followed = len(output)
        self._matcher.consume_tokens(new)
        self._check()

    def allowed(self) -> bytes:
        """One bit for each token of the vocabulary, the lowest bit of a byte first."""
        mask: bytes = self._matcher.compute_bitmask()
        self._check()
        return mask

    def _check(self) -> None:
        if self._matcher.is_error():
            told = " ".join(self._matcher.get_error().split())[:_LONGEST_MESSAGE]
            raise GrammarError(f"the structure of the output cannot be followed: {told}")


class Grammars:
    """Grammars over the vocabulary of a model; the tokenizer is loaded for the first one.

    Args:
        directory: of the model; its tokenizer.json is read.
        vocab_size: of the model, which may be padded beyond the tokenizer's.
        eos_token_ids: allowed where a grammar may end.
    """

    def __init__(self, directory: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._directory = directory
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._tokenizer: Any = None

    def hold(self, logits: Tensor, structured: StructuredOutput, history: TokenHistory) -> None:
        """Make impossible what the grammar does not allow next, in place.

        Args:
            logits: [vocabulary] of one sequence.
            structured: its grammar.
            history: its output; keeps the matcher.

        Raises:
            GrammarError: the sequence cannot go on.
        """
        if history.matcher is None:
            history.matcher = self._matcher(structured)
        history.matcher.follow(history.output)
        forbidden = _forbidden(history.matcher.allowed(), logits.shape[0])
        logits.masked_fill_(forbidden.to(logits.device), -torch.inf)

    def _matcher(self, structured: StructuredOutput) -> GrammarMatcher:
        try:
            if self._tokenizer is None:
                self._tokenizer = self._load_tokenizer()
            return GrammarMatcher(self._tokenizer, grammar_of(structured))
        except (GrammarUnavailableError, ValueError, RecursionError) as error:
            raise GrammarError(str(error)) from None

    def _load_tokenizer(self) -> Any:
        path = self._directory / "tokenizer.json"
        if not path.is_file():
            raise GrammarError(f"structured output needs {path.name} in the model's directory")
        if not self._eos_token_ids:
            raise GrammarError("structured output needs a model with an end-of-sequence token")
        try:
            return load_llguidance().LLTokenizer(
                str(path), n_vocab=self._vocab_size, eos_token=self._eos_token_ids
            )
        except ValueError as error:
            raise GrammarError(f"structured output cannot use {path.name}: {error}") from None


def _forbidden(allowed: bytes, vocabulary: int) -> Tensor:
    """Bits to booleans, [vocabulary], and the other way round."""
    bits = np.unpackbits(np.frombuffer(allowed, dtype=np.uint8), bitorder="little")
    forbidden = np.ones(vocabulary, dtype=np.bool_)
    known = min(len(bits), vocabulary)
    np.equal(bits[:known], 0, out=forbidden[:known])
    return torch.from_numpy(forbidden)
