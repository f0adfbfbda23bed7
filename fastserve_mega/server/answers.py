"""From running generations to an HTTP response, whole or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, Protocol

import msgspec
from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from fastserve_mega.client import AsyncGeneration, Chunk, ClientError
from fastserve_mega.server.errors import from_client_error
from fastserve_mega.types import FinishReason, Usage

_SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
Json = dict[str, Any]


class Shape(Protocol):
    """How one endpoint writes its answers. Each method gives one JSON object, or its `choices`."""

    id_prefix: str
    object_name: str
    chunk_object_name: str

    def choice(self, index: int, text: str, reason: str) -> Json:
        """A whole answer."""

    def opening(self, index: int) -> Json | None:
        """The choice that begins a stream, if there is one."""

    def delta(self, index: int, text: str) -> Json:
        """A piece of a stream."""

    def closing(self, index: int, reason: str) -> Json:
        """The end of a stream."""


async def respond(
    http: Request,
    head: Json,
    generations: Sequence[AsyncGeneration],
    shape: Shape,
    *,
    stream: bool,
    include_usage: bool,
) -> Response:
    """Answer with what the generations yield; they are cancelled when the HTTP client goes away.

    Args:
        http: the request, to notice that its sender has gone.
        head: the fields that each JSON object of the answer begins with.
        generations: one for each prompt, in their order.
        shape: how the endpoint writes choices.
        stream: as server-sent events.
        include_usage: end a stream with the token counts.

    Raises:
        ClientError: a generation failed, and nothing was sent yet.
    """
    watch = asyncio.create_task(_cancel_on_disconnect(http, generations))
    if not stream:
        return _json(await _whole_answer(head, generations, shape, watch))
    events = _events(head, generations, shape, watch, include_usage=include_usage)
    # Nothing is sent before there is something to tell: until then an error has its HTTP status.
    first = await anext(events)
    return StreamingResponse(
        _server_sent(first, events), media_type="text/event-stream", headers=_SSE_HEADERS
    )


async def _cancel_on_disconnect(http: Request, generations: Sequence[AsyncGeneration]) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
    for generation in generations:
        generation.cancel()


async def _whole_answer(
    head: Json,
    generations: Sequence[AsyncGeneration],
    shape: Shape,
    watch: asyncio.Task[None],
) -> Json:
    try:
        await asyncio.gather(*(generation.wait() for generation in generations))
    finally:
        _end(generations, watch)
    choices = [
        shape.choice(index, generation.text, _reason(generation))
        for index, generation in enumerate(generations)
    ]
    return {**head, "choices": choices, "usage": _usage(generations)}


async def _events(
    head: Json,
    generations: Sequence[AsyncGeneration],
    shape: Shape,
    watch: asyncio.Task[None],
    *,
    include_usage: bool,
) -> AsyncIterator[Json]:
    """The JSON objects of a stream, in their order."""
    usage: Json = {"usage": None} if include_usage else {}
    opened = set()
    try:
        async with aclosing(_merge(generations)) as merged:
            async for index, chunk in merged:
                choices = []
                if index not in opened and (opening := shape.opening(index)) is not None:
                    choices.append(opening)
                opened.add(index)
                if chunk is None:
                    choices.append(shape.closing(index, _reason(generations[index])))
                else:
                    choices.append(shape.delta(index, chunk.text))
                for choice in choices:
                    yield {**head, "choices": [choice], **usage}
        if include_usage:
            yield {**head, "choices": [], "usage": _usage(generations)}
    finally:
        _end(generations, watch)


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


async def _server_sent(first: Json, events: AsyncIterator[Json]) -> AsyncIterator[bytes]:
    """Server-sent events; an error in the middle is told as one, since the status is out."""
    yield _sse(first)
    try:
        async for event in events:
            yield _sse(event)
    except ClientError as error:
        yield _sse(from_client_error(error).body)
    yield b"data: [DONE]\n\n"


def _end(generations: Sequence[AsyncGeneration], watch: asyncio.Task[None]) -> None:
    """Whatever happened, nobody is left working for this request."""
    watch.cancel()
    for generation in generations:
        generation.cancel()


def _reason(generation: AsyncGeneration) -> str:
    return (generation.finish_reason or FinishReason.ERROR).value


def _usage(generations: Sequence[AsyncGeneration]) -> Json:
    usages = [generation.usage or Usage(0, 0) for generation in generations]
    prompt = sum(usage.prompt_tokens for usage in usages)
    completion = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in usages)},
    }


def _sse(event: Json) -> bytes:
    return b"data: " + msgspec.json.encode(event) + b"\n\n"


def _json(body: Json) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")
