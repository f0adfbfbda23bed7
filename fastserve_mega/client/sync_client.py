"""The ZeroMQ client for programs without asyncio."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any, TypeVar, Unpack

from fastserve_mega.client.async_client import DEFAULT_ENDPOINT, AsyncClient
from fastserve_mega.client.errors import ServerUnavailableError
from fastserve_mega.client.generation import AnswerSoFar, AsyncGeneration, Chunk
from fastserve_mega.client.options import RequestOptions
from fastserve_mega.messaging.messages import Snapshot, Welcome
from fastserve_mega.text.tokenizer import Tokenizer
from fastserve_mega.types import (
    SamplingParams,
)

T = TypeVar("T")
_CLOSE_TIMEOUT_S = 5.0
_LIVENESS_CHECK_S = 5.0
"""How often a waiting call looks whether the thread it waits for is still alive."""


class Client:
    """`AsyncClient` behind plain calls; may be shared by threads.

    An event loop on a background thread does the work, so heartbeats go on while the program is
    busy elsewhere. Arguments and errors are those of `AsyncClient`.
    """

    def __init__(
        self,
        endpoint: str = DEFAULT_ENDPOINT,
        tokenizer: Tokenizer | str | Path | None = None,
        *,
        timeout_s: float = 10.0,
        heartbeat_s: float = 5.0,
        silence_timeout_s: float = 30.0,
    ) -> None:
        self._async_client = AsyncClient(
            endpoint,
            tokenizer,
            timeout_s=timeout_s,
            heartbeat_s=heartbeat_s,
            silence_timeout_s=silence_timeout_s,
        )
        self._loop = _LoopThread()

    def __enter__(self) -> Client:
        try:
            self.info()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is unfinished and close; may be called again."""
        if self._loop.alive:
            self._loop.run(self._async_client.aclose())
            self._loop.stop()

    def info(self) -> Welcome:
        """Model, context length and vocabulary of the server."""
        return self._loop.run(self._async_client.info())

    def metrics(self) -> str:
        """The server's metrics in Prometheus' text format."""
        return self._loop.run(self._async_client.metrics())

    def snapshot(self, max_requests: int = 200) -> Snapshot:
        """What the server is doing, with at most so many requests of each replica."""
        return self._loop.run(self._async_client.snapshot(max_requests))

    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        **options: Unpack[RequestOptions],
    ) -> Generation:
        """Start to answer a prompt; see `AsyncClient.generate`."""
        started = self._async_client.generate(prompt, params, **options)
        return Generation(self._loop.run(started), self._loop)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        params: SamplingParams | None = None,
        **options: Unpack[RequestOptions],
    ) -> Generation:
        """Start to answer a conversation; see `AsyncClient.chat`."""
        started = self._async_client.chat(messages, params, **options)
        return Generation(self._loop.run(started), self._loop)

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        **options: Unpack[RequestOptions],
    ) -> Generation:
        """`generate` for token ids."""
        return self.generate(tuple(prompt), params, **options)


class Generation(AnswerSoFar):
    """An answer on its way: `for chunk in generation`; see `AsyncGeneration`."""

    def __init__(self, generation: AsyncGeneration, loop: _LoopThread) -> None:
        super().__init__(generation._state)
        self._generation = generation
        self._loop = loop
        self._chunks: deque[Chunk] = deque()

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> Chunk:
        if not self._chunks:
            self._chunks.extend(self._loop.run(self._generation.take()))
        if not self._chunks:
            raise StopIteration
        return self._chunks.popleft()

    def wait(self) -> Generation:
        """Wait for the end; then `text`, `usage` and `finish_reason` tell all."""
        for _ in self:
            pass
        return self

    def cancel(self) -> None:
        """End now with finish reason `abort`; nothing happens when it has ended already."""
        self._loop.run(self._generation.aclose())


class _LoopThread:
    """An event loop on a daemon thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._stopped = asyncio.Event()
        self._thread = threading.Thread(target=self._main, name="fastserve-client", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for its result, or until the thread is gone."""
        try:
            if not self.alive:
                raise RuntimeError("the thread has ended")
            future: Future[T] = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:
            coroutine.close()
            raise ServerUnavailableError("the client was closed") from None
        try:
            while True:
                try:
                    return future.result(timeout=_LIVENESS_CHECK_S)
                except FutureTimeoutError:
                    if future.done():
                        raise
                    if not self.alive:
                        raise ServerUnavailableError("the client was closed") from None
        except BaseException:
            # Above all an interrupt from the keyboard.
            future.cancel()
            raise

    def stop(self) -> None:
        """End the thread."""
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(_CLOSE_TIMEOUT_S)

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._stopped.wait())
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
        finally:
            self._loop.close()
