"""One request at the client: what is known of it, from its submission to its end."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

import msgspec

from fastserve_mega.client.errors import (
    ClientError,
    InvalidRequestError,
    SentAgainError,
    ServerBusyError,
    ServerError,
)
from fastserve_mega.messaging.messages import Finished, PromptLogprobs, Submit, Tokens
from fastserve_mega.text.detokenizer import Detokenizer
from fastserve_mega.types import FinishReason, RequestId, Timings, TokenLogprobs, Usage

_SHORTEST_TIMEOUT_S = 0.001


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer as it arrived."""

    text: str
    """Empty without a tokenizer, inside a character, or while it may begin a stop string."""
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs | None, ...] = ()
    """One for each token when `SamplingParams.logprobs` asks for them, else empty."""


class RequestState:
    """One request from its submission to its end: tokens and text received, and how it ended.

    No I/O and no clock, so resuming can be tested by itself. The session keeps it until the end;
    the consumer keeps an `AsyncGeneration`, which cancels the request when it is dropped.

    Args:
        submit: the message that started it.
        detokenizer: makes text of tokens; None leaves all text empty.
        end_token_ids: tokens after which the server ends the answer by itself.
        submitted_at: seconds on the clock that `resubmission` is asked with.
    """

    def __init__(
        self,
        submit: Submit,
        detokenizer: Detokenizer | None,
        end_token_ids: frozenset[int],
        submitted_at: float,
    ) -> None:
        self.submit = submit
        """As the caller asked for it; see `resubmission`."""
        self._detokenizer = detokenizer
        self._end_token_ids = end_token_ids
        self._submitted_at = submitted_at
        self._failed_attempts = 0
        self._texts: list[str] = []
        self.received: list[int] = []
        self.logprobs: list[TokenLogprobs | None] = []
        """One for each token received, when the request asks for them."""
        self.prompt_logprobs: list[TokenLogprobs | None] = []
        if submit.params.prompt_logprobs:
            self.prompt_logprobs = [None] * len(submit.prompt)
        self.embedding = b""
        self.timings: Timings | None = None
        self.chunks: deque[Chunk] = deque()
        """Not taken by the consumer yet."""
        self.changed = asyncio.Event()
        """Set when there is a chunk to take, or the end."""
        self.finish_reason: FinishReason | None = None
        self.usage: Usage | None = None
        self.error: ClientError | None = None

    @property
    def request_id(self) -> RequestId:
        return self.submit.request_id

    @property
    def done(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    @property
    def progress(self) -> Usage:
        """Token counts so far; what the prefix cache saved is known at the end only."""
        return self.usage or Usage(len(self.submit.prompt), len(self.received))

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self._texts)

    @property
    def stopped_by(self) -> str | None:
        return self._detokenizer.stopped_by if self._detokenizer else None

    def on_tokens(self, message: Tokens) -> None:
        """Take what is new in the message; ends the request when its text is at a stop string."""
        known = len(self.received) - message.offset
        if known < 0:
            self.fail(
                ServerError(
                    f"request {self.request_id}: output tokens {len(self.received)} to "
                    f"{message.offset - 1} were lost on the way"
                )
            )
            return
        new = message.token_ids[known:]
        if not new:
            return
        logprobs = message.logprobs[known:]
        self._failed_attempts = 0
        self.embedding = message.embedding
        self.received.extend(new)
        self.logprobs.extend(logprobs)
        self._add(Chunk(self._detokenizer.push(new) if self._detokenizer else "", new, logprobs))
        if self._detokenizer and self._detokenizer.stopped:
            self.finish(FinishReason.STOP)

    def take_over(self, other: RequestState) -> bool:
        """Go on in the place of a request that is the same, with all it has received.

        The other one ends with an error. False, and nothing happens, when they are not the same.
        """
        same = {"received": (), "timeout_s": None}
        own, others = (msgspec.structs.replace(each.submit, **same) for each in (self, other))
        if not own.fingerprint or own != others:
            return False
        other.fail(SentAgainError("the same request was sent again, and goes on there"))
        logprobs = tuple(other.logprobs)
        self.prompt_logprobs = other.prompt_logprobs
        self.on_tokens(Tokens(self.request_id, 0, tuple(other.received), logprobs, other.embedding))
        return True

    def on_prompt_logprobs(self, message: PromptLogprobs) -> None:
        """Take the log probabilities of prompt tokens; what was computed twice is told twice."""
        end = message.start + len(message.logprobs)
        if end <= len(self.prompt_logprobs):
            self.prompt_logprobs[message.start : end] = message.logprobs

    def on_finished(self, message: Finished) -> None:
        """End as the server says."""
        self.timings = message.timings
        if message.reason is FinishReason.REJECTED:
            told = message.message or "the server is full; try again later"
            self.fail(ServerBusyError(told, message.retry_after_s))
        elif message.reason is FinishReason.ERROR:
            kind = InvalidRequestError if message.is_invalid else ServerError
            self.fail(kind(message.message or "the server failed"))
        else:
            self.finish(message.reason, message.usage)

    def finish(self, reason: FinishReason, usage: Usage | None = None) -> None:
        """End normally, with the text held back so far."""
        if self._detokenizer and (rest := self._detokenizer.flush()):
            self._add(Chunk(rest, ()))
        if self._detokenizer and self._detokenizer.stopped:
            reason = FinishReason.STOP
        self.usage = usage or Usage(len(self.submit.prompt), len(self.received))
        self.finish_reason = reason
        self.changed.set()

    def fail(self, error: ClientError) -> None:
        """End with an error."""
        self.error = error
        self.changed.set()

    def on_loss(self) -> None:
        """The ranks were lost while they computed this request."""
        self._failed_attempts += 1

    def resubmission(self, now: float) -> Submit | None:
        """The message that makes a server go on where this one stopped.

        None when there is nothing left to do: the last token was here already and only the news
        of the end was lost. Then the request is finished.
        """
        if self.received and self.received[-1] in self._end_token_ids:
            self.finish(FinishReason.STOP)
            return None
        if len(self.received) >= self.submit.params.max_tokens:
            self.finish(FinishReason.LENGTH)
            return None
        timeout_s = self.submit.timeout_s
        if timeout_s is not None:
            timeout_s = max(timeout_s - (now - self._submitted_at), _SHORTEST_TIMEOUT_S)
        return msgspec.structs.replace(
            self.submit,
            received=tuple(self.received),
            timeout_s=timeout_s,
            failed_attempts=self._failed_attempts,
        )

    def _add(self, chunk: Chunk) -> None:
        self._texts.append(chunk.text)
        self.chunks.append(chunk)
        self.changed.set()
