"""Connections that are silent, slow, or do not read what they have asked for."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
from collections.abc import AsyncIterator

from fastserve_mega.drill.rounds import Served

CROWD, IDLE = 100, 1000
_SMALL_BUFFER = 4096
# Longer than anybody measures beside it: an answer that has ended makes no work.
_BODY = {
    "prompt": [5, 6, 7],
    "max_tokens": 1500,
    "ignore_eos": True,
    "stream": True,
    "logprobs": 20,
}


def connect(served: Served, buffer: int | None = None) -> socket.socket:
    """A connection to the HTTP server."""
    host, _, port = served.url.removeprefix("http://").partition(":")
    made = socket.socket()
    if buffer:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    made.connect((host, int(port)))
    made.setblocking(False)
    return made


@contextlib.asynccontextmanager
async def idle_and_slow(served: Served) -> AsyncIterator[None]:
    """Connections that say nothing, and ones that say a byte a second; closed ones come again."""

    async def stay(words: bytes) -> None:
        while True:
            reader, writer = await asyncio.open_connection(sock=connect(served))
            with contextlib.suppress(OSError):
                for byte in itertools.chain(words, itertools.repeat(ord(" "))):
                    if words:
                        writer.write(bytes((byte,)))
                        await writer.drain()
                    await asyncio.sleep(1)
                    if reader.at_eof():
                        break
            writer.close()

    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{"
    crowd = [asyncio.create_task(stay(b"")) for _ in range(IDLE)]
    crowd += [asyncio.create_task(stay(head)) for _ in range(CROWD)]
    await asyncio.sleep(3)
    try:
        yield
    finally:
        await _end(crowd)


@contextlib.asynccontextmanager
async def readers(served: Served, *, stalled: bool) -> AsyncIterator[None]:
    """Long answers over HTTP, whose clients read them or do not."""

    async def read() -> None:
        while True:
            made = connect(served, _SMALL_BUFFER)
            reader, writer = await asyncio.open_connection(sock=made, limit=_SMALL_BUFFER)
            body = json.dumps(_BODY).encode()
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            with contextlib.suppress(OSError):
                while not stalled and await reader.read(65536):
                    pass
                await asyncio.sleep(3600 if stalled else 0)
            writer.close()

    crowd = [asyncio.create_task(read()) for _ in range(CROWD)]
    await asyncio.sleep(2)
    try:
        yield
    finally:
        await _end(crowd)


async def _end(crowd: list[asyncio.Task[None]]) -> None:
    for task in crowd:
        task.cancel()
    await asyncio.gather(*crowd, return_exceptions=True)
