"""An answer as its consumer sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fastserve_mega.client.request_state import Chunk, RequestState
from fastserve_mega.types import FinishReason, RequestId, Timings, TokenLogprobs, Usage


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
        return self._state.text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All output tokens that arrived so far."""
        return tuple(self._state.received)

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended the text."""
        return self._state.stopped_by

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
        """One for each prompt token when asked for; they are here before the first output token.

        None for the first, which follows nothing.
        """
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
