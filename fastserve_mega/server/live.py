"""The live view: one page, fed by server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from importlib import resources

from fastapi import APIRouter, Response
from fastapi.responses import HTMLResponse

from fastserve_mega.client import AsyncClient, ServerUnavailableError
from fastserve_mega.server.answers import encode_event, event_stream

_INTERVAL_S = 0.25
_MAX_REQUESTS = 200
_MAX_VIEWERS = 32
# Nothing from elsewhere, not even if a request id should ever hold markup.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
)


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


def live_router(client: AsyncClient, stopping: Callable[[], bool]) -> APIRouter:
    """The page at /, and its events at /live.

    Args:
        client: of the coordinator.
        stopping: whether the server is about to end; an open stream must not hold it up.
    """
    router = APIRouter(include_in_schema=False)
    page = resources.files(__package__).joinpath("live.html").read_text(encoding="utf-8")
    feed = _Feed(client, stopping)

    @router.get("/")
    async def live_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY})

    @router.get("/live")
    async def live_events() -> Response:
        if feed.is_full:
            return Response(f"{_MAX_VIEWERS} viewers are the limit", status_code=503)
        return event_stream(feed.events())

    return router
