"""How many connections the HTTP server holds, and how long it waits for a whole request."""

from __future__ import annotations

import asyncio
import logging
import re
import resource
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import NoReturn, cast

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastserve_mega.logs import LogLimiter
from fastserve_mega.server.errors import ApiError

LIMITS_S = {"head": 10.0, "body": 60.0}
"""Within which a request has to arrive, by its part."""
ACCEPTED_AT_ONCE = 64
"""Connections that the event loop accepts in one turn, before it looks at the first of them."""
_FREE_PIECES = 2048
_PIECE_BYTES = 256
"""For so many bytes of a body there may be one piece more; TCP's own pieces are larger."""
_MOST_UNWANTED = 16 * 2**20
"""Bytes of bodies that are read after their answer, so that a client that sends first reads it."""
_OTHER_FILES = 100
"""Files that the server has open besides its connections, at most."""
_RESERVED_FILES = _OTHER_FILES + 4 * ACCEPTED_AT_ONCE
"""A connection too many is open for up to four turns: accepted, made, refused, closed."""
_MOST_CONNECTIONS = 10_000
_READS_ON_S = 1.0
"""How long an answer may take for a client that has closed its end for writing."""
_ACCEPT_ERROR = "socket.accept() out of system resource"
"""What asyncio says, once for each connection, when no more files can be opened."""
_EMPTY_LINES = re.compile(rb"(?:\r?\n)*")


def most_connections() -> int:
    """As many as this process may have files open, less what it needs for others.

    Where it may have very few open, half of them.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return _MOST_CONNECTIONS
    return min(max(files - _RESERVED_FILES, files // 2, 1), _MOST_CONNECTIONS)


def allow_connections(wanted: int | None) -> int:
    """How many connections there may be; lets this process open more files where it may.

    Args:
        wanted: `server.max_connections`.

    Raises:
        ValueError: the system does not let this process open files for so many.
    """
    if wanted is None:
        return most_connections()
    files, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + _RESERVED_FILES
    if files != resource.RLIM_INFINITY and files < needed:
        if most_files != resource.RLIM_INFINITY and most_files < needed:
            raise ValueError(
                f"server.max_connections {wanted} needs {needed} open files, the limit of this "
                f"process is {most_files} (ulimit -Hn)"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, most_files))
    return wanted


class _StrictConnection(h11.Connection):
    """What h11 makes of the bytes of a client, where it is too strict or not strict enough.

    - Empty lines before a request are none of it (RFC 9112, 2.2).
    - A target with scheme and host, as for a proxy, becomes the path in it (3.2.2).
    - A body with two lengths is refused: a proxy may have gone by the other one (6.3).
    - A body in ever so small chunks is refused: each of them costs as much as a large one.
    """

    complaint = "not valid HTTP"
    status = 400
    _pieces = 0
    _bytes = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        if self.their_state is h11.IDLE and self._has_only_begun():
            return h11.NEED_DATA
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            self.complaint = f"not valid HTTP: {error}"
            self.status = error.error_status_hint
            raise
        if isinstance(event, h11.Request):
            self._pieces = self._bytes = 0
            names = {name for name, _ in event.headers}
            if {b"content-length", b"transfer-encoding"} <= names:
                self._refuse("Content-Length and Transfer-Encoding exclude each other")
            if event.target.lower().startswith((b"http://", b"https://")):
                _, _, host_and_path = event.target.partition(b"://")
                event = _with_target(event, b"/" + host_and_path.partition(b"/")[2])
        elif isinstance(event, h11.Data):
            self._pieces += 1
            self._bytes += len(event.data)
            if self._pieces > (most := _FREE_PIECES + self._bytes // _PIECE_BYTES):
                self._refuse(
                    f"a body of {self._bytes} bytes may come in {most} pieces, got one more"
                )
        return event

    def _has_only_begun(self) -> bool:
        """Drop empty lines; whether all that is left may become one."""
        received, _ = self.trailing_data
        empty = _EMPTY_LINES.match(received)
        if empty and empty.end():
            self._receive_buffer.maybe_extract_at_most(empty.end())
            received = received[empty.end() :]
        return received == b"\r"

    def _refuse(self, complaint: str) -> NoReturn:
        self.complaint = complaint
        raise h11.RemoteProtocolError(complaint)


def _with_target(request: h11.Request, target: bytes) -> h11.Request:
    return h11.Request(
        method=request.method,
        headers=list(request.headers),
        target=target,
        http_version=request.http_version,
    )


class BoundedConnection(H11Protocol):
    """uvicorn's connection, which ends when its client takes too long to say what it wants.

    When there are too many, the one that has been without a request for longest makes room.
    """

    conn: _StrictConnection
    limit = _MOST_CONNECTIONS
    _awaited: str | None = None
    _timer: asyncio.TimerHandle | None = None
    _idle_since = 0.0
    _unwanted = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast("asyncio.Transport", transport))
        self.conn = _StrictConnection(h11.SERVER)
        self._idle_since = self.loop.time()
        self._await("head")
        if len(self.connections) > self.limit:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        state = self.conn.their_state
        self._await("head" if state is h11.IDLE else "body" if state is h11.SEND_BODY else None)
        if state is h11.SEND_BODY and self.cycle and self.cycle.response_complete:
            self._unwanted += len(data)
            if self._unwanted > _MOST_UNWANTED:
                self.transport.abort()  # close would read on

    def eof_received(self) -> bool:  # type: ignore[override]  # as asyncio has it
        """Let a client that has no more to say read its answer, if that comes at once.

        One that has gone looks the same: nobody computes for it for longer.

        Returns:
            Whether the connection stays open for now.
        """
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering:
            self.loop.call_later(_READS_ON_S, self.transport.close)
        return is_answering

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._idle_since = self.loop.time()

    def send_400_response(self, msg: str) -> None:
        """Say what is wrong with what came, which uvicorn does not, if there was no answer yet."""
        self._answer(self.conn.status, self.conn.complaint)

    def _answer(self, status: int, message: str, *headers: tuple[str, str]) -> None:
        """Answer without the application, if nothing was yet, and close."""
        body = msgspec.json.encode(ApiError(status, message).body)
        head = [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
            *headers,
        ]
        reason = HTTPStatus(status).phrase.encode()
        try:
            for event in (
                h11.Response(status_code=status, headers=head, reason=reason),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:
            pass  # the application has begun to answer
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._await(None)
        super().connection_lost(exc)

    @property
    def is_idle(self) -> bool:
        """Whether there is no request on it."""
        return self.conn.their_state is h11.IDLE

    def _await(self, part: str | None) -> None:
        """Give the client its time for a part of a request, unless that runs already."""
        if part == self._awaited:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._awaited = part
        self._timer = None
        if part is not None:
            self._timer = self.loop.call_later(LIMITS_S[part], self._give_up, part)

    def _give_up(self, part: str) -> None:
        limit_s = LIMITS_S[part]
        self.logger.warning("a request's %s was not complete within %g s", part, limit_s)
        if part == "head" and not self.conn.trailing_data[0]:
            self.transport.close()  # nothing was asked
        else:
            self._answer(408, f"the request's {part} was not complete within {limit_s:g} s")

    def _make_room(self) -> None:
        others = [each for each in self.connections if isinstance(each, BoundedConnection)]
        # One that is closed stays in the set until the next turn; it makes room only once.
        open_ones = [each for each in others if not each.transport.is_closing()]
        idle = [each for each in open_ones if each.is_idle and each is not self]
        self.logger.warning("there are more than %d connections", self.limit)
        if idle:
            # Close would wait until the client has read its last answer, which may be never.
            min(idle, key=lambda each: each._idle_since).transport.abort()
        else:
            told = f"all {self.limit} connections are busy (server.max_connections)"
            self._answer(503, told, ("Retry-After", "1"))


def bounded_connections(limit: int) -> type[asyncio.Protocol]:
    """What uvicorn is to make for each connection.

    Args:
        limit: of them at the same time.
    """
    return type("LimitedConnection", (BoundedConnection,), {"limit": limit})


class FewWarnings(logging.Filter):
    """Lets one warning of a kind through in a minute: whoever sends nonsense fills no disk.

    The event loop's errors about connections that it cannot accept count as warnings.

    Args:
        clock: in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._limiter = LogLimiter()

    def filter(self, record: logging.LogRecord) -> bool:
        kind = str(record.msg).partition("\n")[0]
        if record.levelno != logging.WARNING and not kind.startswith(_ACCEPT_ERROR):
            return True
        number = self._limiter.count(kind, self._clock())
        if number > 1:
            record.msg = f"{record.getMessage()} ({number} times since this was last told)"
            record.args = ()
        return number > 0
