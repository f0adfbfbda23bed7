"""Holds sampling to a grammar: which tokens may come next, after the output so far."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastserve_mega.text.structured import (
    GrammarUnavailableError,
    grammar_limits,
    grammar_of,
    load_llguidance,
)
from fastserve_mega.types import StructuredOutput
from fastserve_mega.worker.history import TokenHistory
from fastserve_mega.worker.transfer import to_device

T = TypeVar("T")
_LONGEST_MESSAGE = 300
COMPILE_LIMIT_S = 0.75
"""A grammar has so long from the beginning of its first step; all others of the step wait for it.
What llguidance limits is counted in other units, and not all of it is counted."""
MASK_LIMIT_S = 0.25
"""CPU time for the allowed tokens of one step, in which all others wait. A request that has taken
more ends, so that it does so once."""
_STACK_BYTES = 256 * 2**20
"""A thread that compiles has so much stack. 65,536 characters of definitions that refer to each
other need up to 30 MiB; who compiles them on a usual stack of 8 MiB takes the rank down."""
_FOLLOW_LIMIT_S = 0.001
"""More for each token that is followed, of which there are many after a restart."""
_MOST_OVERDUE = 4
"""Grammars that are still being compiled after their time, before no others are begun."""


class GrammarError(Exception):
    """One request's grammar cannot be followed; str() is one sentence.

    Args:
        message: the sentence.
        is_invalid: the grammar is to blame, and not this rank.
    """

    def __init__(self, message: str, *, is_invalid: bool = False) -> None:
        super().__init__(message)
        self.is_invalid = is_invalid


class GrammarMatcher:
    """One output's way through its grammar. It depends on the output tokens only.

    What comes first is found out at once, since it is what takes longest: then it counts as
    compilation.

    Args:
        tokenizer: of llguidance.
        grammar: in llguidance's form.

    Raises:
        GrammarError: (all methods) the grammar is not valid, too complex, or was left.
    """

    def __init__(self, tokenizer: Any, grammar: str) -> None:
        self._matcher = load_llguidance().LLMatcher(
            tokenizer, grammar, log_level=0, limits=grammar_limits()
        )
        self._followed = 0
        self._check()
        self._mask: bytes | None = self._compute_mask()

    def follow(self, output: Sequence[int]) -> int:
        """Take over what is new in the whole output so far; returns how many tokens that is."""
        if new := list(output[self._followed :]):
            self._followed = len(output)
            self._mask = None
            self._matcher.consume_tokens(new)
            self._check()
        return len(new)

    def allowed(self) -> bytes:
        """One bit for each token of the vocabulary, the lowest bit of a byte first."""
        return self._compute_mask() if self._mask is None else self._mask

    def _compute_mask(self) -> bytes:
        mask: bytes = self._matcher.compute_bitmask()
        self._check()
        return mask

    def _check(self) -> None:
        if self._matcher.is_error():
            reason, *_ = self._matcher.get_error().partition("<state>")
            told = " ".join(reason.split())[:_LONGEST_MESSAGE]
            raise GrammarError(
                f"the structure of the output cannot be followed: {told}", is_invalid=True
            )


def _on_a_thread(make: Callable[[], T]) -> Future[T]:
    """Begin to make something that nobody has to wait for: the process can end though it does not.

    The stack is as deep as the deepest grammar.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(make())
        except Exception as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, name="grammar", daemon=True)
    usual = threading.stack_size(_STACK_BYTES)
    try:
        thread.start()
    finally:
        threading.stack_size(usual)
    return future


class Compilation:
    """A grammar that is being compiled, on a thread of its own.

    Args:
        matcher: comes in time, or not.
        deadline: of the monotonic clock.
    """

    def __init__(self, matcher: Future[GrammarMatcher], deadline: float) -> None:
        self._matcher = matcher
        self._deadline = deadline

    @classmethod
    def start(cls, compile_grammar: Callable[[], GrammarMatcher], limit_s: float) -> Compilation:
        """Begin."""
        return cls(_on_a_thread(compile_grammar), time.monotonic() + limit_s)

    @classmethod
    def failed(cls, error: GrammarError) -> Compilation:
        """One that cannot be."""
        future: Future[GrammarMatcher] = Future()
        future.set_exception(error)
        return cls(future, 0.0)

    @property
    def is_done(self) -> bool:
        return self._matcher.done()

    def result(self) -> GrammarMatcher:
        """Wait for the end.

        Raises:
            GrammarError: the grammar is not valid or too complex.
            TimeoutError: it takes too long.
        """
        return self._matcher.result(max(self._deadline - time.monotonic(), 0.0))


class Grammars:
    """Grammars over the vocabulary of a model.

    Its tokenizer is loaded at once, and meanwhile the rank goes on: no request finds all others
    waiting for that, which may take seconds.

    Args:
        directory: of the model; its tokenizer.json is read.
        vocab_size: of the model, which may be padded beyond the tokenizer's.
        eos_token_ids: allowed where a grammar may end.
        limit_s: longest compilation; see COMPILE_LIMIT_S.
        mask_limit_s: longest search for the next allowed tokens; see MASK_LIMIT_S.
    """

    def __init__(
        self,
        directory: Path,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        limit_s: float = COMPILE_LIMIT_S,
        mask_limit_s: float = MASK_LIMIT_S,
    ) -> None:
        self._directory = directory
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._limit_s = limit_s
        self._mask_limit_s = mask_limit_s
        self._overdue: list[Compilation] = []
        self._tokenizer: Future[Any] = _on_a_thread(self._load_tokenizer)

    def begin(self, structured: StructuredOutput, history: TokenHistory) -> None:
        """Compile the grammar of a sequence, on a thread of its own, if that was not begun yet."""
        if history.compilation is None:
            history.compilation = self._compile(structured)

    def hold(self, logits: Tensor, structured: StructuredOutput, history: TokenHistory) -> None:
        """Make impossible what the grammar does not allow next, in place.

        Args:
            logits: [vocabulary] of one sequence.
            structured: its grammar.
            history: its output; keeps the compiled grammar.

        Raises:
            GrammarError: the sequence cannot go on.
        """
        self.begin(structured, history)
        assert history.compilation is not None
        output = history.output
        if structured.after is not None:
            if structured.after not in output:
                # Without the form there is no end.
                logits[self._eos_token_ids] = -torch.inf
                return
            output = output[output.index(structured.after) + 1 :]
        matcher = self._result(history.compilation)
        # CPU time, since that other work holds up this thread is not the grammar's fault.
        begin = time.thread_time()
        num_new = matcher.follow(output)
        forbidden = _forbidden(matcher.allowed(), logits.shape[0])
        spent_s = time.thread_time() - begin
        if spent_s > (limit_s := self._mask_limit_s + num_new * _FOLLOW_LIMIT_S):
            raise GrammarError(
                f"the structure of the output took {spent_s:.2g} s for a token, the limit is "
                f"{limit_s:.2g} s",
                is_invalid=True,
            )
        logits.masked_fill_(to_device(forbidden, logits.device), -torch.inf)

    def _compile(self, structured: StructuredOutput) -> Compilation:
        self._overdue = [each for each in self._overdue if not each.is_done]
        if len(self._overdue) >= _MOST_OVERDUE:
            message = f"{len(self._overdue)} other structures take too long; try again later"
            return Compilation.failed(GrammarError(message))
        try:
            tokenizer = self._tokenizer.result()
            grammar = grammar_of(structured)
        except GrammarError as error:
            return Compilation.failed(error)
        except GrammarUnavailableError as error:
            return Compilation.failed(GrammarError(str(error)))
        except (ValueError, RecursionError) as error:
            return Compilation.failed(GrammarError(str(error), is_invalid=True))
        return Compilation.start(partial(GrammarMatcher, tokenizer, grammar), self._limit_s)

    def _result(self, compilation: Compilation) -> GrammarMatcher:
        try:
            return compilation.result()
        except TimeoutError:
            self._overdue.append(compilation)
            raise GrammarError(
                f"the structure of the output takes more than {self._limit_s:g} s to compile",
                is_invalid=True,
            ) from None

    def _load_tokenizer(self) -> Any:
        path = self._directory / "tokenizer.json"
        if not path.is_file():
            raise GrammarError(f"structured output needs {path.name} in the model's directory")
        if not self._eos_token_ids:
            raise GrammarError("structured output needs a model with an end-of-sequence token")
        tokenizer: Any = load_llguidance().LLTokenizer
        try:
            try:
                return tokenizer(str(path), n_vocab=self._vocab_size, eos_token=self._eos_token_ids)
            except ValueError:
                # It may have tokens that the model has not: none of those is ever sampled.
                return tokenizer(str(path), eos_token=self._eos_token_ids)
        except ValueError as error:
            raise GrammarError(f"structured output cannot use {path.name}: {error}") from None


def _forbidden(allowed: bytes, vocabulary: int) -> Tensor:
    """Bits to booleans, [vocabulary], and the other way round."""
    bits = np.unpackbits(np.frombuffer(allowed, dtype=np.uint8), bitorder="little")
    forbidden = np.ones(vocabulary, dtype=np.bool_)
    known = min(len(bits), vocabulary)
    np.equal(bits[:known], 0, out=forbidden[:known])
    return torch.from_numpy(forbidden)
