"""`fastserve-mega batch`: many requests from a file, answers to another one, over HTTP."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastserve_mega.offline.batch_files import (
    AnswerFile,
    BatchRequest,
    count_requests,
    read_requests,
)
from fastserve_mega.types import BACKGROUND_PRIORITY

if TYPE_CHECKING:
    import httpx

_ANSWER_S = 24 * 3600.0
"""Longest wait for an answer: a busy server may leave a request of lowest priority waiting."""
_CONNECT_S = 10.0
_TRY_AGAIN = frozenset({429, 500, 502, 503, 504})
"""Statuses of a server that is full or is starting again; 500 is tried a few times only."""
_MOST_FAILURES = 3
_PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0)


class BatchError(Exception):
    """The batch cannot go on; str() is one sentence."""


class _Sender:
    """Sends requests, and again where the server was not able to answer.

    Args:
        http: to the server.
        patience_s: longest time without any answer.
        say: tells the user that nobody answers, once until somebody does.
    """

    def __init__(
        self, http: httpx.AsyncClient, patience_s: float, say: Callable[[str], object]
    ) -> None:
        import httpx

        self._http = http
        self._lost = httpx.TransportError
        self._patience_s = patience_s
        self._last_answer = time.monotonic()
        self._say = say
        self._has_said = False

    async def send(self, request: BatchRequest) -> tuple[int, str, Any]:
        """Status, request id and body of the answer.

        Raises:
            BatchError: the server has answered nothing for too long.
        """
        body = {"priority": BACKGROUND_PRIORITY, **request.body}
        tries = failures = 0
        while True:
            said = ""
            try:
                response = await self._http.post(request.url, json=body)
                failures += response.status_code == 500
                if response.status_code not in _TRY_AGAIN or failures >= _MOST_FAILURES:
                    self._last_answer = time.monotonic()
                    self._has_said = False
                    request_id = response.headers.get("x-request-id", "")
                    return response.status_code, request_id, _body_of(response)
                said = f"status {response.status_code}"
            except self._lost as error:
                said = f"{type(error).__name__}: {error}"
                if not self._has_said:
                    self._has_said = True
                    self._say(f"nobody answers ({said}); trying for {self._patience_s:g} s")
            if time.monotonic() - self._last_answer > self._patience_s:
                raise BatchError(f"no answer for {self._patience_s:g} s ({said})")
            await asyncio.sleep(_PAUSES_S[min(tries, len(_PAUSES_S) - 1)])
            tries += 1


def _body_of(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return {"error": {"message": response.text[:200]}}


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """What to ask whom."""

    url: str
    """Address of the server, with or without /v1."""
    requests: Path
    """In OpenAI's batch format."""
    answers: Path
    """To append to; what is answered there already is not asked again."""
    concurrency: int
    """Requests that the server has at a time."""
    patience_s: float
    """Longest time without any answer from the server."""
    api_key: str | None = None


def run_batch(options: BatchOptions) -> int:
    """Answer all requests of a file that have no answer yet; returns the exit status."""
    try:
        total = count_requests(options.requests)
        with AnswerFile(options.answers) as file, _progress() as progress:
            bar = progress.add_task(options.requests.name, total=total, completed=len(file.done))
            refused = asyncio.run(
                _answer_all(options, file, lambda: progress.advance(bar), progress.console.print)
            )
    except (BatchError, ValueError, OSError) as error:
        print(f"fastserve-mega batch: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fastserve-mega batch: interrupted; the same command goes on", file=sys.stderr)
        return 130
    answers = f"{total:,} answer{'s' if total != 1 else ''} in {options.answers}"
    print(answers + (f", {refused:,} refused" if refused else ""))
    return 0


async def _answer_all(
    options: BatchOptions,
    file: AnswerFile,
    advance: Callable[[], object],
    say: Callable[[str], object],
) -> int:
    """Send what has no answer yet; returns how many were refused."""
    waiting = (each for each in read_requests(options.requests) if each.custom_id not in file.done)
    refused = 0
    async with _connect(options) as http:
        sender = _Sender(http, options.patience_s, say)

        async def work() -> None:
            nonlocal refused
            for request in waiting:
                status, request_id, body = await sender.send(request)
                file.add(request.custom_id, status, request_id, body)
                refused += status >= 400
                advance()

        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(options.concurrency):
                    tasks.create_task(work())
        except* (BatchError, OSError) as group:
            raise BatchError(str(group.exceptions[0])) from None
    return refused


def _connect(options: BatchOptions) -> httpx.AsyncClient:
    import httpx

    return httpx.AsyncClient(
        base_url=options.url.rstrip("/").removesuffix("/v1"),
        headers={"Authorization": f"Bearer {options.api_key}"} if options.api_key else {},
        timeout=httpx.Timeout(_ANSWER_S, connect=_CONNECT_S),
        limits=httpx.Limits(max_connections=options.concurrency),
        trust_env=False,
    )


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
