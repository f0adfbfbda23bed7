"""The live view: a page (server/page), fed by server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from importlib import resources
from pathlib import Path

from fastapi import APIRouter, Response

from fastserve_mega.client import AsyncClient, ServerUnavailableError
from fastserve_mega.server.answers import encode_event, event_stream

_INTERVAL_S = 0.25
_MAX_REQUESTS = 200
_MAX_VIEWERS = 32
# Nothing from elsewhere, not even if a request id should ever hold markup.
_POLICY = "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'"
_PAGE = "index.html"
_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}


class _Feed:
    """Asks the coordinator while there are viewers, once for all of them."""

    def __init__(self, client: AsyncClient, stopping: Callable[[], bool]) -> None:
        self._client = client
        self._stopping = stopping
        self._viewers: set[asyncio.Queue[bytes]] = set()
        self._task: asyncio.Task[None] | None = None

    @property
    def is_full(self) -> bool:
        return len(self._viewers) >= _MAX_VIEWERS

    async def events(self) -> AsyncIterator[bytes]:
        """Until the viewer goes away or the server stops."""
        # One event at most waits for a slow viewer, who misses those in between.
        queue: asyncio.Queue[bytes] = asyncio.Queue(maxsize=1)
        self._viewers.add(queue)
        if self._task is None:
            self._task = asyncio.create_task(self._ask())
        try:
            while not self._stopping():
                yield await queue.get()
        finally:
            self._viewers.discard(queue)
            if not self._viewers and self._task is not None:
                self._task.cancel()
                self._task = None

    async def _ask(self) -> None:
        while True:
            try:
                snapshot = await self._client.snapshot(_MAX_REQUESTS)
                event = encode_event(snapshot)
            except ServerUnavailableError:
                event = encode_event({}, "unavailable")
            for queue in self._viewers:
                with contextlib.suppress(asyncio.QueueFull):
                    queue.put_nowait(event)
            await asyncio.sleep(_INTERVAL_S)


def _read_files() -> dict[str, Response]:
    """Answers by the name of the file."""
    return {
        file.name: Response(
            file.read_bytes(),
            media_type=_MEDIA_TYPES[Path(file.name).suffix],
            headers={"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"},
        )
        for file in resources.files(__package__).joinpath("page").iterdir()
    }


def live_router(client: AsyncClient, stopping: Callable[[], bool]) -> APIRouter:
    """The page at /, its parts below /live/, and its events at /live.

    Args:
        client: of the coordinator.
        stopping: whether the server is about to end; an open stream must not hold it up.
    """
    router = APIRouter(include_in_schema=False)
    files = _read_files()
    feed = _Feed(client, stopping)

    @router.api_route("/", methods=["GET", "HEAD"])
    async def live_page() -> Response:
        return files[_PAGE]

    @router.get("/live/{name}")
    async def live_file(name: str) -> Response:
        return files.get(name) or Response(status_code=404)

    @router.get("/live")
    async def live_events() -> Response:
        if feed.is_full:
            return Response(f"{_MAX_VIEWERS} viewers are the limit", status_code=503)
        return event_stream(feed.events())

    return router
