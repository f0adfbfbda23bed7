"""One request at the client, from its submission to its end, and what its consumer sees of it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

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


@dataclass(slots=True, eq=False, repr=False)
class RequestState:
    """One request from its submission to its end: tokens and text received, and how it ended.

    No I/O and no clock, so resuming can be tested by itself. The session keeps it until the end;
    the consumer keeps an `AsyncGeneration`, which cancels the request when it is dropped.
    """

    submit: Submit
    """As the caller asked for it; see `resubmission`."""
    detokenizer: Detokenizer | None
    """Makes text of tokens; None leaves all text empty."""
    end_token_ids: frozenset[int]
    """Tokens after which the server ends the answer by itself."""
    submitted_at: float
    """Seconds on the clock that `resubmission` is asked with."""
    failed_attempts: int = 0
    """How often in a row the ranks were lost while they computed it."""
    texts: list[str] = field(default_factory=list)
    received: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    """One for each token received, when the request asks for them."""
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    embedding: bytes = b""
    timings: Timings | None = None
    chunks: deque[Chunk] = field(default_factory=deque)
    """Not taken by the consumer yet."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when there is a chunk to take, or the end."""
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: ClientError | None = None

    def __post_init__(self) -> None:
        if self.submit.params.prompt_logprobs:
            self.prompt_logprobs = [None] * len(self.submit.prompt)

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

    def on_tokens(self, message: Tokens) -> None:
        """Take what is new in the message; ends the request when its text is at a stop string."""
        have = len(self.received)
        known = have - message.offset
        if known < 0:
            lost = f"output tokens {have} to {message.offset - 1} were lost on the way"
            self.fail(ServerError(f"request {self.request_id}: {lost}"))
            return
        new = message.token_ids[known:]
        if not new:
            return
        logprobs = message.logprobs[known:]
        self.failed_attempts = 0
        self.embedding = message.embedding
        self.received.extend(new)
        self.logprobs.extend(logprobs)
        self._add(Chunk(self.detokenizer.push(new) if self.detokenizer else "", new, logprobs))
        if self.detokenizer and self.detokenizer.stopped:
            self.finish(FinishReason.STOP)

    def take_over(self, other: RequestState) -> bool:
        """Go on in the place of the same request, which ends; False if they are not the same."""
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
        if self.detokenizer and (rest := self.detokenizer.flush()):
            self._add(Chunk(rest, ()))
        if self.detokenizer and self.detokenizer.stopped:
            reason = FinishReason.STOP
        self.usage = usage or self.progress
        self.finish_reason = reason
        self.changed.set()

    def fail(self, error: ClientError) -> None:
        """End with an error."""
        self.error = error
        self.changed.set()

    def resubmission(self, now: float) -> Submit | None:
        """The message that makes a server go on where this one stopped.

        None, and the request is finished, when only the news of its end was lost.
        """
        at_end = bool(self.received) and self.received[-1] in self.end_token_ids
        if at_end or len(self.received) >= self.submit.params.max_tokens:
            self.finish(FinishReason.STOP if at_end else FinishReason.LENGTH)
            return None
        timeout_s = self.submit.timeout_s
        if timeout_s is not None:
            timeout_s = max(timeout_s - (now - self.submitted_at), _SHORTEST_TIMEOUT_S)
        return msgspec.structs.replace(
            self.submit,
            received=tuple(self.received),
            timeout_s=timeout_s,
            failed_attempts=self.failed_attempts,
        )

    def _add(self, chunk: Chunk) -> None:
        self.texts.append(chunk.text)
        self.chunks.append(chunk)
        self.changed.set()


class AnswerSoFar:
    """What has arrived of an answer, whether it was iterated over or not."""

    def __init__(self, state: RequestState) -> None:
        self._state = state

    @property
    def request_id(self) -> RequestId:
        return self._state.request_id

    @property
    def finish_reason(self) -> FinishReason | None:
        """How it ended; None while it runs, and when it ended with an error."""
        return self._state.finish_reason

    @property
    def usage(self) -> Usage | None:
        """Token counts; None until it ended."""
        return self._state.usage

    @property
    def progress(self) -> Usage:
        """Token counts so far; `usage` when it has ended."""
        return self._state.progress

    @property
    def text(self) -> str:
        """All text that arrived so far."""
        return "".join(self._state.texts)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All output tokens that arrived so far."""
        return tuple(self._state.received)

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended the text."""
        return self._state.detokenizer.stopped_by if self._state.detokenizer else None

    @property
    def logprobs(self) -> tuple[TokenLogprobs | None, ...]:
        """One for each of `token_ids` when asked for, else empty."""
        return tuple(self._state.logprobs)

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        """The prompt that is answered."""
        return self._state.submit.prompt

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprobs | None, ...]:
        """One for each prompt token when asked for (None for the first), before any output."""
        return tuple(self._state.prompt_logprobs)

    @property
    def timings(self) -> Timings | None:
        """When the coordinator began it, and so on; None until it ended, or was not begun."""
        return self._state.timings

    @property
    def embedding(self) -> bytes:
        """That of the prompt, if asked for, once the token is here: 32-bit floats, little-endian.

        `array.array("f", generation.embedding)` has the numbers.
        """
        return self._state.embedding


class AsyncGeneration(AnswerSoFar):
    """An answer on its way: `async for chunk in generation`.

    Iterating raises what ended the request otherwise than normally: `InvalidRequestError`,
    `ServerBusyError`, `ServerError` or `ServerUnavailableError`. Ends by a time limit or by
    `cancel()` are normal and are told by `finish_reason`. A generation that is dropped unfinished
    is cancelled.
    """

    def __init__(self, state: RequestState, cancel: Callable[[RequestState], None]) -> None:
        super().__init__(state)
        self._cancel = cancel
        self._loop = asyncio.get_running_loop()

    def __aiter__(self) -> AsyncGeneration:
        return self

    async def __anext__(self) -> Chunk:
        # The client ends every request when the server is silent, so this ends.
        while not self._state.chunks and not self._state.done:
            self._state.changed.clear()
            await self._state.changed.wait()
        if self._state.chunks:
            return self._state.chunks.popleft()
        if self._state.error is not None:
            raise self._state.error
        raise StopAsyncIteration

    async def take(self) -> list[Chunk]:
        """All chunks that are here, after waiting for the first; empty at the end."""
        try:
            chunks = [await self.__anext__()]
        except StopAsyncIteration:
            return []
        chunks.extend(self._state.chunks)
        self._state.chunks.clear()
        return chunks

    async def wait(self) -> AsyncGeneration:
        """Wait for the end; then `text`, `usage` and `finish_reason` tell all."""
        while await self.take():
            pass
        return self

    def cancel(self) -> None:
        """End now with finish reason `abort`; nothing happens when it has ended already."""
        self._cancel(self._state)

    async def aclose(self) -> None:
        """Cancel, for `contextlib.aclosing`."""
        self.cancel()

    def __del__(self) -> None:
        if not self._state.done and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._cancel, self._state)
