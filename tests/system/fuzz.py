#!/usr/bin/env python3
"""Send nonsense to a served deployment; print what came back, and what an honest stream noticed.

    python -m tests.system.fuzz --config configs/smollm2-135m-cpu.yaml --bodies 20000 --frames 20000

Bodies are made from the server's own OpenAPI page: right values, values of other types and from the
edges, and broken JSON. Frames are valid messages with a field exchanged, bytes turned over or cut
off, and noise. A failure is an answer with a status of 500, none at all, or an honest stream with
other tokens. The ranks compute nothing, so that all time is the server's and the coordinator's.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import random
import sys
import time
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import zmq
import zmq.asyncio

from fastserve_mega.client import AsyncClient
from fastserve_mega.drill.drill import serving
from fastserve_mega.messaging import frames, messages
from fastserve_mega.system.config_file import load_config
from fastserve_mega.types import RequestId, SamplingParams

from .asked import Figure, tell

EDGES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 0.5, -0.0, 1e-46, 1e308, 2**31, 2**53, 2**63 - 1, 2**63, 2**64,
    -(2**63), 10**40, "", "a", "0", "\ud800", "\x00", "é" * 50, "a" * 5000, [], {}, [[]], [None],
    [0] * 100, ["x"] * 200, [-1], [2**40], {"a": {"b": [{}]}}, "json_object", "auto", "none",
]  # fmt: skip
VALID = {
    "/v1/completions": {"prompt": [5, 6, 7], "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/v1/responses": {"input": "hi", "max_output_tokens": 2},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/v1/embeddings": {"input": "hi"},
    "/tokenize": {"prompt": "hello"},
    "/detokenize": {"tokens": [5, 6]},
}
LIMITS = ("max_tokens", "max_output_tokens")
AT_ONCE = 8
SUBMIT = (*messages.Submit.__struct_fields__, "max_requests")
HONEST = SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True)
HONEST_PROMPT = [11, 12, 13]
ANSWER_S = 60.0


class Nonsense:
    """Bodies and frames that follow from a seed.

    Args:
        seed: of all of them.
        page: the OpenAPI page.
    """

    def __init__(self, seed: int, page: dict[str, Any]) -> None:
        self._random = random.Random(seed)
        self._page = page
        self._fields = {
            path: self._properties(operations["post"])
            for path, operations in page["paths"].items()
            if "requestBody" in operations.get("post", {})
        }

    def _properties(self, operation: dict[str, Any]) -> dict[str, Any]:
        content = operation["requestBody"]["content"]
        if "application/json" not in content:
            return {}
        properties: dict[str, Any] = self._resolve(content["application/json"]["schema"]).get(
            "properties", {}
        )
        return properties

    def _resolve(self, schema: dict[str, Any]) -> dict[str, Any]:
        while "$ref" in schema:
            schema = self._page["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        return schema

    def body(self) -> tuple[str, bytes]:
        """A path and what is sent there."""
        draw = self._random
        path = draw.choice(list(self._fields))
        body: dict[str, Any] = dict(VALID.get(path, {}))
        fields = self._fields[path]
        for name in draw.sample(list(fields), min(len(fields), draw.choice((0, 1, 1, 2, 3, 8)))):
            right = draw.random() < 0.5
            body[name] = self._right(fields[name]) if right else self._any()
        if draw.random() < 0.1:
            body[draw.choice(("", "x", "Stream", "max_token"))] = self._any()
        # Without its limit a good body asks for an answer as long as the context.
        missing = [name for name in body if name not in LIMITS]
        if draw.random() < 0.1 and missing:
            del body[draw.choice(missing)]
        raw = json.dumps(body).encode()
        return path, self._broken(raw) if draw.random() < 0.1 else raw

    def _right(self, schema: dict[str, Any], depth: int = 0) -> Any:
        """A value that the page allows, more or less."""
        draw, schema = self._random, self._resolve(schema)
        if forms := schema.get("anyOf") or schema.get("oneOf"):
            return self._right(draw.choice(forms), depth + 1)
        if "enum" in schema:
            return draw.choice(schema["enum"])
        low, high = schema.get("minimum", 0), schema.get("maximum", 8)
        fields = schema.get("properties", {})
        makers: dict[str, Callable[[], Any]] = {
            "integer": lambda: draw.choice((low, min(high, low + 3))),
            "number": lambda: draw.uniform(low, min(high, low + 2)),
            "boolean": lambda: draw.random() < 0.5,
            "string": lambda: "".join(draw.choices('abc {}"é日', k=draw.randrange(12))),
            "array": lambda: [self._right(schema.get("items", {}), depth + 1) for _ in range(2)],
            "object": lambda: {name: self._right(fields[name], depth + 1) for name in fields},
        }
        return makers.get(schema.get("type", ""), self._any)() if depth < 6 else None

    def _any(self, depth: int = 0) -> Any:
        draw = self._random
        if depth < 3 and draw.random() < 0.2:
            return [self._any(depth + 1) for _ in range(draw.randrange(4))]
        if depth < 3 and draw.random() < 0.1:
            return {draw.choice("abc"): self._any(depth + 1)}
        return draw.choice(EDGES)

    def _broken(self, raw: bytes) -> bytes:
        draw, broken = self._random, bytearray(raw)
        for _ in range(draw.randrange(1, 6)):
            if broken:
                broken[draw.randrange(len(broken))] = draw.randrange(256)
        return bytes(broken[: draw.randrange(len(broken) + 1)] if draw.random() < 0.5 else broken)

    def message(self) -> list[bytes]:
        """The frames of a message to the coordinator."""
        draw = self._random
        name = f"fuzz-{draw.randrange(10**9)}"
        plain = {
            "type": draw.choice(("Submit", "Submit", "Cancel", "Hello", "Ping", "GetMetrics",
                                 "GetSnapshot", "Tokens", "StepCommand", "WorkerReady", "?")),
            "request_id": name, "prompt": [1, 2], "params": {"max_tokens": 2},
        }  # fmt: skip
        match draw.randrange(4):
            case 0:
                frame = draw.randbytes(draw.randrange(60))
            case 1:
                submit = messages.Submit(RequestId(name), (1, 2), SamplingParams(max_tokens=2))
                frame = self._broken(frames.encode(submit))
            case _:
                for field in draw.sample(SUBMIT, draw.randrange(3)):
                    plain[field] = self._packable()
                frame = b"\x02" + msgspec.msgpack.encode(plain)
        return [frame, *([b"more"] * draw.randrange(1, 4) if draw.random() < 0.05 else [])]

    def _packable(self) -> Any:
        while True:
            value = self._any()
            try:
                msgspec.msgpack.encode(value)
            except (OverflowError, UnicodeEncodeError):
                continue
            return value


class Honest:
    """A client that asks the same again and again, and notes how long it waits for a token."""

    def __init__(self) -> None:
        self.gaps: list[float] = []
        """Between two tokens of a stream."""
        self.firsts: list[float] = []
        """From a request to its first token."""
        self.tokens: collections.Counter[tuple[int, ...]] = collections.Counter()

    async def run(self, client: AsyncClient) -> None:
        while True:
            last = time.monotonic()
            generation = await client.submit(HONEST_PROMPT, HONEST)
            waits = self.firsts
            async for _ in generation:
                now = time.monotonic()
                waits.append(now - last)
                last, waits = now, self.gaps
            self.tokens[generation.token_ids] += 1

    def noticed(self) -> str:
        """The longest waits since this was last asked."""
        figures = [max(waits, default=float("nan")) * 1000 for waits in (self.gaps, self.firsts)]
        self.gaps.clear()
        self.firsts.clear()
        return "largest gap {:.0f} ms, first token {:.0f} ms".format(*figures)


async def send_bodies(url: str, nonsense: Nonsense, count: int) -> collections.Counter[str]:
    outcomes: collections.Counter[str] = collections.Counter()
    left = iter(range(count))

    async def send(http: httpx.AsyncClient) -> None:
        for _ in left:
            path, body = nonsense.body()
            headers = {"Content-Type": "application/json"}
            try:
                answer = await http.post(path, content=body, headers=headers)
                outcome = str(answer.status_code)
            except httpx.HTTPError as error:
                outcome = type(error).__name__
            outcomes[outcome] += 1
            if not outcome.isdigit() or outcome == "500":
                print(f"{outcome} {path} {body[:300]!r}", file=sys.stderr)

    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_S, trust_env=False) as http:
        await asyncio.gather(*(send(http) for _ in range(AT_ONCE)))
    return outcomes


async def send_frames(endpoint: str, nonsense: Nonsense, count: int) -> collections.Counter[str]:
    """All frames over one connection after another; each ends with a request that is answered."""
    outcomes: collections.Counter[str] = collections.Counter()
    context = zmq.asyncio.Context()
    for begin in range(0, count, 500):
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        frames.connect(socket, endpoint)
        for _ in range(min(500, count - begin)):
            await socket.send_multipart(nonsense.message())
        last = messages.Submit(RequestId(f"last-{begin}"), (1, 2), SamplingParams(max_tokens=1))
        await socket.send(frames.encode(last))
        while True:
            frame = await asyncio.wait_for(socket.recv(), ANSWER_S)
            try:
                message = frames.decode(frame)
            except frames.OtherVersionError as error:
                outcomes[f"Refused to version {error.version}"] += 1
                continue
            outcomes[type(message).__name__] += 1
            if isinstance(message, messages.Finished) and message.request_id == last.request_id:
                break
        socket.close()
    context.destroy(linger=0)
    return outcomes


async def fuzz(url: str, endpoint: str, bodies: int, num_frames: int, seed: int) -> bool:
    """Send everything and print the figures; whether nothing has failed."""
    async with (
        AsyncClient(endpoint) as client,
        httpx.AsyncClient(base_url=url, timeout=ANSWER_S, trust_env=False) as http,
    ):
        nonsense = Nonsense(seed, (await http.get("/openapi.json")).json())
        honest = Honest()
        running = asyncio.create_task(honest.run(client))
        while not honest.tokens:  # the first one loads the tokenizer
            await asyncio.sleep(0.1)
        honest.noticed()
        await asyncio.sleep(5)
        print(f"undisturbed: {honest.noticed()}", flush=True)
        figures: list[Figure] = []
        for what, sending in (
            ("bodies", send_bodies(url, nonsense, bodies)),
            ("frames", send_frames(endpoint, nonsense, num_frames)),
        ):
            begin = time.monotonic()
            outcomes = await sending
            took, gap_s = f"{time.monotonic() - begin:.0f} s", max(honest.gaps, default=0.0)
            noticed, counted = honest.noticed(), dict(sorted(outcomes.items()))
            print(f"{what}: {counted} in {took}; {noticed}", flush=True)
            figures.append(Figure(f"largest gap beside {what}, s", gap_s, 1))
            if what == "bodies":
                bad = sum(n for key, n in outcomes.items() if key == "500" or not key.isdigit())
                figures.append(Figure("bodies that got 500 or no answer", bad, 0))
        print(f"honest answers: {sum(honest.tokens.values())}")
        figures.append(Figure("kinds of honest answers", len(honest.tokens), 1))
        figures.append(Figure("honest streams that have failed", running.done(), 0))
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    return tell(figures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--bodies", type=int, default=20_000)
    parser.add_argument("--frames", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts = (options.bodies, options.frames, options.seed)
    with serving(load_config(options.config), ["--config", options.config], "fake") as served:
        return 0 if asyncio.run(fuzz(served.url, served.endpoint, *counts)) else 1


if __name__ == "__main__":
    sys.exit(main())
