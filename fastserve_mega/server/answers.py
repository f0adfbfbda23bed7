"""From running generations to an HTTP response, whole or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import msgspec
from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from fastserve_mega.client import AsyncGeneration, Chunk, ClientError
from fastserve_mega.server.errors import from_client_error
from fastserve_mega.types import FinishReason

Json = dict[str, Any]


class Choice(Protocol):
    """One of the answers to a request, as its endpoint writes it.

    Each method gives entries of `choices`. An object writes one answer, in a stream or whole, and
    may keep what it needs to know of the pieces before.
    """

    def whole(self, text: str, chunk: Chunk, reason: str) -> Json:
        """A whole answer: its text, and all its tokens as one chunk."""

    def opening(self) -> list[Json]:
        """What begins a stream."""

    def delta(self, chunk: Chunk) -> list[Json]:
        """A piece of a stream."""

    def closing(self, reason: str) -> list[Json]:
        """The end of a stream."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What an HTTP request gets: its generations, and how they are written."""

    head: Json
    """The fields that each JSON object of the answer begins with."""
    generations: Sequence[AsyncGeneration]
    """`answers_per_prompt` for each prompt, in their order."""
    choices: Sequence[Choice]
    """One for each generation."""
    answers_per_prompt: int = 1

    @property
    def usage(self) -> Json:
        """Token counts so far; a prompt with several answers counts once."""
        usages = [generation.progress for generation in self.generations]
        prompts = usages[:: self.answers_per_prompt]
        prompt = sum(usage.prompt_tokens for usage in prompts)
        completion = sum(usage.completion_tokens for usage in usages)
        cached = sum(usage.cached_tokens for usage in prompts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def end(self) -> None:
        """Cancel what still runs for this request, whatever happened."""
        for generation in self.generations:
            generation.cancel()


UsageInStream = Literal["never", "at the end", "always"]


async def respond(http: Request, answer: Answer, *, stream: bool, usage: UsageInStream) -> Response:
    """Answer with what the generations yield; they are cancelled when the HTTP client goes away.

    Args:
        http: the request, to notice that its sender has gone.
        answer: what to answer with.
        stream: as server-sent events.
        usage: when a stream tells the token counts; `always` is with each piece.

    Raises:
        ClientError: a generation failed, and nothing was sent yet.
    """
    watch = asyncio.create_task(_cancel_on_disconnect(http, answer))
    if not stream:
        return _json(await _whole_answer(answer, watch))
    events = _events(answer, watch, usage)
    # Nothing is sent before there is something to tell: until then an error has its HTTP status.
    first = await anext(events)
    return event_stream(_server_sent(first, events))


async def _cancel_on_disconnect(http: Request, answer: Answer) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
    answer.end()


async def _whole_answer(answer: Answer, watch: asyncio.Task[None]) -> Json:
    try:
        await asyncio.gather(*(generation.wait() for generation in answer.generations))
    finally:
        watch.cancel()
        answer.end()
    choices = [
        choice.whole(
            generation.text,
            Chunk(generation.text, generation.token_ids, generation.logprobs),
            _reason(generation),
        )
        for choice, generation in zip(answer.choices, answer.generations, strict=True)
    ]
    return {**answer.head, "choices": choices, "usage": answer.usage}


async def _events(
    answer: Answer, watch: asyncio.Task[None], usage: UsageInStream
) -> AsyncIterator[Json]:
    """The JSON objects of a stream, in their order."""
    opened = set()
    try:
        async with aclosing(_merge(answer.generations)) as merged:
            async for index, chunk in merged:
                choice = answer.choices[index]
                written = [] if index in opened else choice.opening()
                opened.add(index)
                if chunk is None:
                    written += choice.closing(_reason(answer.generations[index]))
                else:
                    written += choice.delta(chunk)
                told: Json = {}
                if usage != "never":
                    told = {"usage": answer.usage if usage == "always" else None}
                for each in written:
                    yield {**answer.head, "choices": [each], **told}
        if usage != "never":
            yield {**answer.head, "choices": [], "usage": answer.usage}
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


async def _server_sent(first: Json, events: AsyncIterator[Json]) -> AsyncIterator[bytes]:
    """Server-sent events; an error in the middle is told as one, since the status is out."""
    yield encode_event(first)
    try:
        async for event in events:
            yield encode_event(event)
    except ClientError as error:
        yield encode_event(from_client_error(error).body)
    yield b"data: [DONE]\n\n"


def _reason(generation: AsyncGeneration) -> str:
    return (generation.finish_reason or FinishReason.ERROR).value


def event_stream(events: AsyncIterator[bytes]) -> StreamingResponse:
    """Respond with server-sent events that no cache keeps and no proxy holds back."""
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


def encode_event(data: object, name: str = "") -> bytes:
    """Write a server-sent event: JSON data, under a name or without one."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + msgspec.json.encode(data) + b"\n\n"


def _json(body: Json) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")
