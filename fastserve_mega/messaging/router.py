"""The ROUTER end of a channel: one socket, many peers, nothing that can block."""

from __future__ import annotations

import os
from collections.abc import Iterator

import zmq

from fastserve_mega.messaging.codec import MAX_FRAME_BYTES, encode
from fastserve_mega.messaging.messages import Message

Identity = bytes
"""ZeroMQ's name of a connected peer."""


class PeerGoneError(Exception):
    """The peer has disconnected."""


class PeerBusyError(Exception):
    """The peer does not read: its buffer is full."""


class Router:
    """A bound ROUTER socket."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        buffer: int,
        *,
        silence_limit_s: float | None = None,
    ) -> None:
        """Bind.

        Args:
            context: of this process.
            endpoint: for example tcp://127.0.0.1:5570; port 0 picks a free one.
            buffer: messages held for a peer that does not read.
            silence_limit_s: a peer whose ZeroMQ does not answer for so long counts as gone, as
                when its host is cut off; None: only a closed connection does.

        Raises:
            OSError: the endpoint cannot be bound; the message names it and says why.
        """
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 1000)
        self.socket.setsockopt(zmq.SNDHWM, buffer)
        self.socket.setsockopt(zmq.RCVHWM, 0)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        if silence_limit_s is not None:
            self.socket.setsockopt(zmq.HEARTBEAT_IVL, int(silence_limit_s * 1000 / 4))
            self.socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(silence_limit_s * 1000))
        try:
            self.socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.socket.close(linger=0)
            reason = os.strerror(error.errno or 0)
            raise OSError(f"cannot listen on {endpoint}: {reason}") from None

    @property
    def endpoint(self) -> str:
        """The bound address, with the port that was picked."""
        return self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def send(self, peer: Identity, message: Message) -> None:
        """Send without waiting.

        Raises:
            PeerGoneError: it has disconnected.
            PeerBusyError: its buffer is full; the message was not sent.
        """
        self.send_frame(peer, encode(message))

    def send_frame(self, peer: Identity, frame: bytes) -> None:
        """Like `send`, for a message that was encoded before."""
        try:
            self.socket.send_multipart((peer, frame), zmq.DONTWAIT)
        except zmq.Again:
            raise PeerBusyError from None
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                raise PeerGoneError from None
            raise

    def receive(self, limit: int = 1000) -> Iterator[tuple[Identity, list[bytes]]]:
        """Yield what has arrived by now: (peer, frames).

        At most `limit` messages, so that a flood cannot keep the caller from its other work.
        """
        for _ in range(limit):
            try:
                peer, *frames = self.socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            yield peer, frames

    def close(self) -> None:
        self.socket.close()
