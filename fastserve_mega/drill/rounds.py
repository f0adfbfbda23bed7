"""One round of a drill: streams, a signal, and what is left when all is well again."""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import httpx

from fastserve_mega.client import AsyncClient, ClientError
from fastserve_mega.drill.processes import (
    HTTP_SERVER,
    Victim,
    abandoned_memory,
    listening_ports,
    named_processes,
)
from fastserve_mega.drill.streams import WAIT_S, Stream, over_http, over_zeromq
from fastserve_mega.launcher import SETTLED_S
from fastserve_mega.process_tree import is_running

_LOOK_S = 0.1
_FIRST_TOKENS = 3
"""A stream that has got so many is taken for one that runs."""


@dataclass(frozen=True, slots=True)
class Served:
    """A running `serve`."""

    process_id: int
    url: str
    endpoint: str


@dataclass
class Tally:
    """What the rounds of one victim have cost."""

    victim: Victim
    rounds: int = 0
    streams: int = 0
    lost: int = 0
    wrong: int = 0
    next_token_s: list[float] = field(default_factory=list)
    orphans: int = 0
    ports_left: int = 0
    memory_left: int = 0
    """Files of shared memory."""

    @property
    def is_clean(self) -> bool:
        """Whether nothing was lost, wrong or left."""
        left = self.orphans or self.ports_left or self.memory_left
        return not (self.lost or self.wrong or left)

    @property
    def row(self) -> list[str]:
        """A row of the report."""
        times = self.next_token_s or [float("nan")]
        figures = [self.rounds, self.streams, self.lost, self.wrong]
        return [
            self.victim.name,
            self.victim.signal.name,
            *map(str, figures),
            f"{statistics.median(times):.1f}",
            f"{max(times):.1f}",
            *map(str, (self.orphans, self.ports_left, self.memory_left)),
        ]


class Drill:
    """Streams that are always the same, so that what they answer can be checked.

    Args:
        served: the deployment, all of whose processes this one may send signals to.
        num_streams: at a time; every second one is over HTTP.
        num_tokens: of each answer.
    """

    def __init__(self, served: Served, num_streams: int, num_tokens: int) -> None:
        self._served = served
        self._num_streams = num_streams
        self._num_tokens = num_tokens
        self._expected: list[str] = []

    async def undisturbed(self) -> None:
        """Run all streams once, for the answers that are right.

        Raises:
            RuntimeError: they do not come to their end even so.
        """
        streams = await self.run_streams(lambda: None)
        for stream in streams:
            if stream.error:
                raise RuntimeError(
                    f"a stream has failed before anything was killed: {stream.error}"
                )
        self._expected = [stream.answer for stream in streams]

    async def round(self, victim: Victim, tally: Tally) -> None:
        """Send the signal while all streams run; add what it has cost to the tally."""
        before = named_processes(self._served.process_id)
        ports, abandoned = listening_ports(self._served.process_id), abandoned_memory()
        moment = 0.0

        def strike() -> None:
            nonlocal moment
            moment = time.monotonic()
            os.kill(before[victim.name], victim.signal)

        streams = await self.run_streams(strike)
        after = await self._recovered(victim, before)
        lost = {name for name in before if (name == HTTP_SERVER) == (victim.name == HTTP_SERVER)}
        if others := [name for name in before if name not in lost and before[name] != after[name]]:
            raise RuntimeError(f"{', '.join(others)} did not survive the loss of {victim.name}")
        tally.rounds += 1
        self._judge(streams, tally)
        for stream in streams:
            if (next_token_s := stream.next_token_s(moment)) is not None:
                tally.next_token_s.append(next_token_s)
        tally.orphans += sum(is_running(before[name]) for name in lost)
        # Ports that are chosen anew with each start are others, but not more.
        tally.ports_left += max(len(listening_ports(self._served.process_id)) - len(ports), 0)
        tally.memory_left += len(abandoned_memory() - abandoned)
        # Sooner, the next loss would count as an attempt in vain, after which `serve` waits.
        await asyncio.sleep(SETTLED_S)

    async def calm(self, tally: Tally) -> None:
        """Let all streams run and harm nothing; add what came of them to the tally."""
        self._judge(await self.run_streams(lambda: None), tally)

    def _judge(self, streams: Sequence[Stream], tally: Tally) -> None:
        tally.streams += len(streams)
        for stream, expected in zip(streams, self._expected, strict=True):
            if stream.error:
                print(f"{stream.kind}: {stream.error}", file=sys.stderr)
            tally.lost += bool(stream.error)
            tally.wrong += not stream.error and stream.answer != expected

    async def run_streams(self, when_running: Callable[[], None]) -> list[Stream]:
        """Run all streams to their ends.

        Args:
            when_running: called when each of them has got its first tokens.
        """
        served = self._served
        async with (
            AsyncClient(served.endpoint, timeout_s=WAIT_S) as client,
            httpx.AsyncClient(base_url=served.url, timeout=WAIT_S, trust_env=False) as http,
        ):
            vocab_size = (await client.info()).vocab_size
            kinds: list[Literal["HTTP", "ZeroMQ"]] = ["HTTP", "ZeroMQ"]
            streams = [
                Stream(number, kinds[number % 2], self._num_tokens, vocab_size)
                for number in range(self._num_streams)
            ]
            tasks = [
                asyncio.create_task(
                    over_http(http, each) if each.kind == "HTTP" else over_zeromq(client, each)
                )
                for each in streams
            ]
            while not all(
                task.done() or len(stream.times) >= _FIRST_TOKENS
                for task, stream in zip(tasks, streams, strict=True)
            ):
                await asyncio.sleep(_LOOK_S / 10)
            when_running()
            await asyncio.gather(*tasks)
        return streams

    async def _recovered(self, victim: Victim, before: dict[str, int]) -> dict[str, int]:
        """Wait until the victim has been replaced and all processes are there and answer.

        Returns:
            The processes by their names.

        Raises:
            RuntimeError: they are not, in time.
        """
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            now = named_processes(self._served.process_id)
            replaced = now.keys() == before.keys() and now[victim.name] != before[victim.name]
            if replaced and await self._answers():
                return now
            await asyncio.sleep(_LOOK_S)
        raise RuntimeError(f"{victim.name} has not been replaced within {WAIT_S:g} s")

    async def _answers(self) -> bool:
        try:
            async with (
                AsyncClient(self._served.endpoint, timeout_s=1.0),
                httpx.AsyncClient(base_url=self._served.url, timeout=1.0, trust_env=False) as http,
            ):
                return (await http.get("/health")).status_code == 200
        except (ClientError, httpx.HTTPError):
            return False
