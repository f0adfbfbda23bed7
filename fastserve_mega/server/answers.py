"""From running generations to an HTTP response, whole or as a stream of server-sent events.

The one loop of all endpoints that generate. How an API writes its answers is an `AnswerShape`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from fastserve_mega.client import AsyncGeneration, Chunk, ClientError
from fastserve_mega.server.errors import ApiError, from_client_error
from fastserve_mega.server.protocol import GenerationRequest
from fastserve_mega.types import FinishReason, Usage

Json = dict[str, Any]


class AnswerShape(Protocol):
    """How an API writes an answer. An object writes one answer, in a stream or whole.

    In a stream its methods are called in the order in which things happen, so it may keep what it
    needs to know of the pieces before. They write server-sent events, see `encode_event`.
    Generations are told by their index.
    """

    last_words: bytes
    """Ends a stream, after an error too."""

    def whole(self) -> Json:
        """The body of the response, when all generations have ended."""

    def opening(self, index: int) -> Iterable[bytes]:
        """What comes before the first piece of a generation."""

    def delta(self, index: int, chunk: Chunk) -> Iterable[bytes]:
        """A piece of a generation."""

    def closing(self, index: int) -> Iterable[bytes]:
        """The end of a generation."""

    def end(self) -> Iterable[bytes]:
        """The end of all."""

    def failure(self, error: ApiError) -> Iterable[bytes]:
        """An error after the stream has begun."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What an HTTP request gets: its generations."""

    body: GenerationRequest
    """Of the request, in the form of a completion or chat completion."""
    answer_id: str
    model: str
    """The served model's name."""
    generations: Sequence[AsyncGeneration]
    """`body.answers_per_prompt` for each prompt, in their order."""
    on_end: Callable[[int], None] | None = None
    """Told of the tokens that were generated, perhaps more than once."""
    begun_at_ns: int = field(default_factory=time.time_ns)
    """When its generations were submitted, nanoseconds since 1970."""

    @property
    def usage(self) -> Usage:
        """Token counts so far; a prompt with several answers counts once."""
        usages = [generation.progress for generation in self.generations]
        prompts = usages[:: self.body.answers_per_prompt]
        return Usage(
            sum(usage.prompt_tokens for usage in prompts),
            0 if self.body.only_prompts else sum(usage.completion_tokens for usage in usages),
            sum(usage.cached_tokens for usage in prompts),
        )

    def text_and_tokens(self, index: int) -> Chunk:
        """All of a generation as one piece."""
        if self.body.only_prompts:
            return Chunk("", ())
        generation = self.generations[index]
        return Chunk(generation.text, generation.token_ids, generation.logprobs)

    def reason(self, index: int) -> str:
        """Why a generation has ended."""
        if self.body.only_prompts:
            return FinishReason.LENGTH.value
        return (self.generations[index].finish_reason or FinishReason.ERROR).value

    def end(self) -> None:
        """Cancel what still runs for this request, whatever happened."""
        for generation in self.generations:
            generation.cancel()
        if self.on_end is not None:
            self.on_end(sum(each.progress.completion_tokens for each in self.generations))


async def respond(http: Request, answer: Answer, shape: AnswerShape) -> Response:
    """Answer with what the generations yield; they are cancelled when the HTTP client goes away.

    Args:
        http: the request, to notice that its sender has gone.
        answer: what to answer with.
        shape: writes it.

    Raises:
        ClientError: a generation failed, and nothing was sent yet.
    """
    if not answer.body.stream:
        return await respond_whole(http, answer, shape.whole)
    watch = asyncio.create_task(_cancel_on_disconnect(http, answer))
    events = _events(answer, shape, watch)
    # Nothing is sent before there is something to tell: until then an error has its HTTP status.
    first = await anext(events)
    return event_stream(_server_sent(first, events, shape))


async def respond_whole(http: Request, answer: Answer, whole: Callable[[], Json]) -> Response:
    """Answer with the body that `whole` writes when all generations have ended.

    Raises:
        ClientError: a generation failed.
    """
    watch = asyncio.create_task(_cancel_on_disconnect(http, answer))
    try:
        await asyncio.gather(*(generation.wait() for generation in answer.generations))
    finally:
        watch.cancel()
        answer.end()
    return Response(msgspec.json.encode(whole()), media_type="application/json")


async def _cancel_on_disconnect(http: Request, answer: Answer) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
    answer.end()


async def _events(
    answer: Answer, shape: AnswerShape, watch: asyncio.Task[None]
) -> AsyncIterator[bytes]:
    """The events of a stream, in their order."""
    opened = set()
    try:
        async with aclosing(_merge(answer.generations)) as merged:
            async for index, chunk in merged:
                if index not in opened:
                    opened.add(index)
                    for event in shape.opening(index):
                        yield event
                if chunk is not None and answer.body.only_prompts:
                    continue
                for event in shape.closing(index) if chunk is None else shape.delta(index, chunk):
                    yield event
        for event in shape.end():
            yield event
    finally:
        watch.cancel()
        answer.end()


async def _merge(
    generations: Sequence[AsyncGeneration],
) -> AsyncGenerator[tuple[int, Chunk | None], None]:
    """Chunks of all generations as they come, with None at the end of each."""
    arrived: asyncio.Queue[tuple[int, Chunk | None] | ClientError] = asyncio.Queue(maxsize=1)

    async def pump(index: int, generation: AsyncGeneration) -> None:
        try:
            async for chunk in generation:
                await arrived.put((index, chunk))
            await arrived.put((index, None))
        except ClientError as error:
            await arrived.put(error)

    if len(generations) == 1:
        async for chunk in generations[0]:
            yield 0, chunk
        yield 0, None
        return
    pumps = [asyncio.create_task(pump(i, generation)) for i, generation in enumerate(generations)]
    try:
        unfinished = len(pumps)
        while unfinished:
            item = await arrived.get()
            if isinstance(item, ClientError):
                raise item
            unfinished -= item[1] is None
            yield item
    finally:
        for task in pumps:
            task.cancel()


async def _server_sent(
    first: bytes, events: AsyncIterator[bytes], shape: AnswerShape
) -> AsyncIterator[bytes]:
    """Server-sent events; an error in the middle is told as one, since the status is out."""
    yield first
    try:
        async for event in events:
            yield event
    except ClientError as error:
        for event in shape.failure(from_client_error(error)):
            yield event
    if shape.last_words:
        yield shape.last_words


def event_stream(events: AsyncIterator[bytes]) -> StreamingResponse:
    """Respond with server-sent events that no cache keeps and no proxy holds back."""
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


def encode_event(data: object, name: str = "") -> bytes:
    """Write a server-sent event: JSON data, under a name or without one."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + msgspec.json.encode(data) + b"\n\n"
