"""The load of a drill: streams over HTTP and ZeroMQ, with the moments of their tokens."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from fastserve_mega.client import AsyncClient, ClientError
from fastserve_mega.types import SamplingParams

if TYPE_CHECKING:
    import httpx

WAIT_S = 300.0
"""Longest wait for anything."""
_RETRY_S = 0.2
_PROMPT_TOKENS = 16


@dataclass
class Stream:
    """One request of a round, and what came of it."""

    number: int
    kind: Literal["HTTP", "ZeroMQ"]
    num_tokens: int
    vocab_size: int
    times: list[float] = field(default_factory=list)
    """When each piece came, of the monotonic clock."""
    answer: str = ""
    """Text of its answer, or token ids."""
    error: str = "unfinished"
    """Why it did not come to its end; empty when it did."""

    @property
    def prompt(self) -> list[int]:
        """Token ids that no other stream has."""
        first = 1 + self.number * _PROMPT_TOKENS
        return [1 + token % (self.vocab_size - 1) for token in range(first, first + _PROMPT_TOKENS)]

    def next_token_s(self, since: float) -> float | None:
        """The longest time without a token after a moment; None when none came after it.

        Not simply the next token: one that was on its way at the moment of the signal does not
        mean that tokens are computed again.
        """
        times = [since, *(moment for moment in self.times if moment > since)]
        if len(times) == 1:
            return None
        return max(after - before for before, after in itertools.pairwise(times))


async def over_zeromq(client: AsyncClient, stream: Stream) -> None:
    """Run a stream over ZeroMQ; the client goes on by itself when the server is lost."""
    # Sampled, with a seed: the tokens must be the same whatever is started again meanwhile.
    params = SamplingParams(max_tokens=stream.num_tokens, ignore_eos=True, seed=stream.number)
    tokens: list[int] = []
    try:
        async for chunk in await client.submit(stream.prompt, params):
            stream.times.append(time.monotonic())
            tokens += chunk.token_ids
    except ClientError as error:
        stream.error = str(error)
        return
    stream.answer, stream.error = str(tokens), ""


async def over_http(http: httpx.AsyncClient, stream: Stream) -> None:
    """Run a stream over HTTP, as a program should: with a key, and again when it is cut off."""
    import httpx

    deadline = time.monotonic() + WAIT_S
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    while True:
        try:
            await _try_http(http, stream, headers)
            return
        except httpx.TransportError as error:
            stream.error = f"{type(error).__name__} {error}"
        except _AgainError as error:
            stream.error = str(error)
        if time.monotonic() > deadline:
            return
        await asyncio.sleep(_RETRY_S)


class _AgainError(Exception):
    """The server asks to try again."""


async def _try_http(http: httpx.AsyncClient, stream: Stream, headers: dict[str, str]) -> None:
    body = {
        "prompt": stream.prompt,
        "max_tokens": stream.num_tokens,
        "ignore_eos": True,
        "seed": stream.number,
        "stream": True,
    }
    text = ""
    async with http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        if response.status_code in (429, 503):
            raise _AgainError((await response.aread()).decode())
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "choices" not in event:
                stream.error = line
                return
            stream.times.append(time.monotonic())
            text += event["choices"][0]["text"]
            if event["choices"][0]["finish_reason"] == "length":
                stream.answer, stream.error = text, ""
