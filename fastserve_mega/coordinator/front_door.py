"""Where clients come in: checks what they send, and delivers what is theirs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import zmq

from fastserve_mega.messaging.frames import (
    MAX_FRAME_BYTES,
    BadFrameError,
    Identity,
    OtherVersionError,
    PeerBusyError,
    PeerGoneError,
    Router,
    decode,
    encode,
    encode_refusal,
)
from fastserve_mega.messaging.messages import (
    Cancel,
    Finished,
    GetMetrics,
    GetSnapshot,
    Hello,
    Message,
    Ping,
    Refused,
    Submit,
)

ClientMessage = Hello | Submit | Cancel | Ping | GetMetrics | GetSnapshot

_SWEEP_INTERVAL_S = 1.0
_UNREAD_MESSAGES = 1_000
"""Messages of a client held here; what is more waits at the client."""
_MOST_OWED = 100_000
"""Last words for a client that does not read; to what it asks beyond this nobody listens."""


@dataclass(slots=True)
class _Session:
    last_heard: float
    owed: deque[bytes] = field(default_factory=deque)
    """Last words for a client whose buffer is full; sent when it shows life again."""


class FrontDoor:
    """The clients' socket and what is known about each client."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        *,
        buffer: int,
        timeout_s: float,
        max_frame_bytes: int = MAX_FRAME_BYTES,
        secret_key: bytes | None = None,
    ) -> None:
        self._router = Router(
            context,
            endpoint,
            buffer,
            unread=_UNREAD_MESSAGES,
            max_frame_bytes=max_frame_bytes,
            secret_key=secret_key,
        )
        self._timeout_s = timeout_s
        self._sessions: dict[Identity, _Session] = {}
        self._gone: set[Identity] = set()
        self._too_slow: set[Identity] = set()
        self._next_sweep = 0.0

    @property
    def socket(self) -> zmq.Socket[bytes]:
        return self._router.socket

    @property
    def endpoint(self) -> str:
        return self._router.endpoint

    def receive(self, now: float) -> Iterator[tuple[Identity, ClientMessage]]:
        """Yield valid messages; anything else is answered with Refused and goes no further."""
        for client, frames in self._router.receive():
            if (session := self._sessions.get(client)) is None:
                session = self._sessions[client] = _Session(now)
            session.last_heard = now
            self._settle(client, session)
            if len(session.owed) >= _MOST_OWED:
                continue
            try:
                message = self._decode(frames)
            except OtherVersionError as error:
                self._send_frame(client, encode_refusal(Refused(str(error)), error.version))
                continue
            except BadFrameError as error:
                self.send(client, Refused(str(error), error.request_id))
                continue
            yield client, message

    def send(self, client: Identity, message: Message | bytes) -> None:
        """Deliver, or note that the client is gone or too slow (see `take_lost`).

        Args:
            client: it goes to.
            message: or its frame.
        """
        frame = message if isinstance(message, bytes) else encode(message)
        delivered = self._send_frame(client, frame)
        if not delivered and isinstance(message, Finished) and client in self._sessions:
            self._sessions[client].owed.append(frame)

    def _send_frame(self, client: Identity, frame: bytes) -> bool:
        """False when the client's buffer is full."""
        try:
            self._router.send_frame(client, frame)
        except PeerGoneError:
            self._gone.add(client)
        except PeerBusyError:
            self._too_slow.add(client)
            return False
        return True

    def take_lost(self, now: float) -> Iterator[tuple[Identity, str]]:
        """Clients whose requests must end, with the reason; each is named once."""
        # A client whose signs of life wait to be read has not been silent.
        if now >= self._next_sweep and not self._router.has_unread:
            self._next_sweep = now + _SWEEP_INTERVAL_S
            silent_since = now - self._timeout_s
            self._gone.update(c for c, s in self._sessions.items() if s.last_heard < silent_since)
        # Their last words may fail to be sent as well, and name them again: next time.
        too_slow, self._too_slow = self._too_slow, set()
        gone, self._gone = self._gone, set()
        for client in too_slow - gone:
            yield client, "the client reads too slowly and its buffer is full"
        for client in gone:
            self._sessions.pop(client, None)
            yield client, "the client went away"

    def close(self) -> None:
        self._router.close()

    def _settle(self, client: Identity, session: _Session) -> None:
        while session.owed and self._send_frame(client, session.owed[0]):
            session.owed.popleft()

    @staticmethod
    def _decode(frames: list[bytes]) -> ClientMessage:
        if len(frames) != 1:
            raise BadFrameError(f"a message is 1 frame, got {len(frames)}")
        message = decode(frames[0])
        if not isinstance(message, ClientMessage):
            raise BadFrameError(f"{type(message).__name__} is not for clients to send")
        return message
