#!/usr/bin/env python3
"""Kill or stop each process of a served deployment in turn, under streams; print what it costs.

    python tests/system/lost_processes.py --config configs/smollm2-135m-cpu.yaml

Half of the streams are HTTP's and half ZeroMQ's. For each process: how many streams did not come to
their end, and the pause of the others, from the signal to the next token.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from fastserve_mega.client import AsyncClient, ClientError
from fastserve_mega.process_tree import descendants
from fastserve_mega.types import SamplingParams

VICTIMS = [
    ("worker", signal.SIGKILL), ("coordinator", signal.SIGKILL), ("prterun", signal.SIGKILL),
    ("coordinator", signal.SIGSTOP), ("api-server", signal.SIGKILL),
    ("api-server", signal.SIGSTOP),
]  # fmt: skip
PROMPT = list(range(100, 132))
WAIT_S = 300.0


@dataclass
class Stream:
    """When its tokens came, and whether it came to its end."""

    kind: str
    times: list[float] = field(default_factory=list)
    is_complete: bool = False

    def pause_s(self, since: float) -> float | None:
        """From a moment to the next token."""
        return next((moment - since for moment in self.times if moment > since), None)


def find(server: int, name: str) -> int:
    """The last process of a kind below `serve`, which for ranks is not rank 0."""
    found = []
    for process_id in sorted(descendants(server)):
        words = Path(f"/proc/{process_id}/cmdline").read_bytes().decode().split("\0")
        program = Path(words[0]).name
        kind = words[words.index("fastserve_mega") + 1] if "python" in program else program
        if kind == name:
            found.append(process_id)
    return found[-1]


async def over_http(http: httpx.AsyncClient, stream: Stream, tokens: int) -> None:
    body = {"prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    try:
        async with http.stream("POST", "/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                stream.times += [time.monotonic()] if '"choices"' in line else []
                stream.is_complete |= '"length"' in line
    except httpx.HTTPError as error:
        print(f"  {stream.kind}: {type(error).__name__}", file=sys.stderr)


async def over_zeromq(client: AsyncClient, stream: Stream, tokens: int) -> None:
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    try:
        async for _ in await client.submit(PROMPT, params):
            stream.times.append(time.monotonic())
        stream.is_complete = True
    except ClientError as error:
        print(f"  {stream.kind}: {error}", file=sys.stderr)


async def drill(server: int, url: str, endpoint: str, options: argparse.Namespace) -> None:
    print(
        "| process | signal | streams lost (HTTP, ZeroMQ) | pause: median, longest | new request |"
    )
    print("|---|---|---|---|---|")
    for name, number in VICTIMS:
        async with (
            httpx.AsyncClient(base_url=url, timeout=WAIT_S) as http,
            AsyncClient(endpoint) as client,
        ):
            kinds = ["HTTP", "ZeroMQ"] * (options.streams // 2)
            streams = [Stream(kind) for kind in kinds]
            running = [
                asyncio.create_task(
                    over_http(http, stream, options.tokens)
                    if stream.kind == "HTTP"
                    else over_zeromq(client, stream, options.tokens)
                )
                for stream in streams
            ]
            while not all(len(stream.times) > 4 for stream in streams):
                await asyncio.sleep(0.05)
            begin = time.monotonic()
            os.kill(find(server, name), number)
            fresh = Stream("HTTP")
            async with httpx.AsyncClient(base_url=url, timeout=WAIT_S) as another:
                await asyncio.sleep(0.1)
                await over_http(another, fresh, 4)
            await asyncio.gather(*running)
        report(name, number, begin, streams, fresh)


def report(
    name: str, number: signal.Signals, begin: float, streams: list[Stream], fresh: Stream
) -> None:
    lost = [
        f"{sum(not s.is_complete for s in streams if s.kind == kind)} of "
        f"{sum(s.kind == kind for s in streams)}"
        for kind in ("HTTP", "ZeroMQ")
    ]
    # Tokens that were on their way at the moment of the signal are none of the next start.
    pauses = [max(p, longest_gap(s, begin)) for s in streams if (p := s.pause_s(begin)) is not None]
    pauses = pauses or [float("nan")]
    new = fresh.pause_s(begin)
    print(
        f"| {name} | {number.name} | {', '.join(lost)} | {statistics.median(pauses):.1f} s, "
        f"{max(pauses):.1f} s | {'none' if new is None else f'{new:.1f} s'} |",
        flush=True,
    )


def longest_gap(stream: Stream, since: float) -> float:
    """The longest time without a token after a moment."""
    times = [since, *(moment for moment in stream.times if moment > since)]
    return max((after - before for before, after in itertools.pairwise(times)), default=0)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default="configs/smollm2-135m-cpu.yaml")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=150, help="of each answer")
    options = parser.parse_args()
    endpoint, port = f"tcp://127.0.0.1:{free_port()}", free_port()
    sets = [f"coordinator.client_endpoint={endpoint}", f"server.port={port}"]
    words = [word for value in sets for word in ("--set", value)]
    command = [sys.executable, "-m", "fastserve_mega", "serve", "--config", options.config, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            while b"Ctrl-C ends it" not in (line := server.stdout.readline()):
                if not line:
                    return 1
            asyncio.run(drill(server.pid, f"http://127.0.0.1:{port}", endpoint, options))
        finally:
            server.terminate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
