"""Frames: what messages are on the wire, and the ROUTER socket that passes them to many peers."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from typing import Any, get_args

import msgspec
import zmq

from fastserve_mega.messaging.messages import Message, Refused
from fastserve_mega.records import explain
from fastserve_mega.types import RequestId

Identity = bytes
"""ZeroMQ's name of a connected peer."""
PROTOCOL_VERSION = 2
MAX_FRAME_BYTES = 16 * 2**20
"""A frame is refused unread beyond this; the longest prompts of today are far below it."""

_CLIENT_FRAME_BYTES = 2**20
_CLIENT_FRAME_BYTES_PER_TOKEN = 64

_MAX_PORT = 2**16 - 1
_VERSION_BYTE = bytes((PROTOCOL_VERSION,))
_HEADERS = {1: b"\x01\x23"}
"""What a Refused begins with where that is not the version byte alone: version 1 had a number for
each kind of message."""
_TYPES = frozenset(cls.__name__ for cls in get_args(Message))
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(type=Message)


def worker_identity(rank: int) -> bytes:
    """ZeroMQ's name of a rank's connection: so the coordinator knows it before it says anything."""
    return f"rank-{rank}".encode()


def with_key(endpoint: str, key: str) -> str:
    """The endpoint for ranks, which only the ranks are told, with the key that it asks for."""
    return f"{endpoint} {key}"


def without_key(endpoint: str) -> tuple[str, str]:
    """The address in an endpoint, and its key, which is empty when it has none."""
    address, _, key = endpoint.partition(" ")
    return address, key


def connect(socket: zmq.Socket[Any], endpoint: str) -> None:
    """Connect, with the key that stands behind the address if there is one (`with_key`).

    Raises:
        ValueError: ZeroMQ does not understand the one or the other.
    """
    address, key = without_key(endpoint)
    try:
        if key:
            socket.curve_serverkey = key.encode()
            socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
        _prepare(socket, address)
        socket.connect(address)
    except zmq.ZMQError as error:
        raise ValueError(f"not a ZeroMQ address: {address!r} ({error})") from None


def _prepare(socket: zmq.Socket[Any], address: str) -> None:
    """Let a socket use an IPv6 address, as in tcp://[::1]:5570, and refuse a port that is none.

    The first only then: for a name, ZeroMQ would prefer IPv6 to the IPv4 address that the other end
    may use. Of a port above 65,535 ZeroMQ takes the lower 16 bits, and another would be open.

    Raises:
        zmq.ZMQError: there is no such port.
    """
    if "[" in address:
        socket.setsockopt(zmq.IPV6, 1)
    port = address.rpartition(":")[2]
    if address.startswith("tcp://") and port.isdecimal() and int(port) > _MAX_PORT:
        raise zmq.ZMQError(errno.EINVAL, f"the highest port is {_MAX_PORT}")


def _path_is_in_use(endpoint: str) -> bool:
    """Whether somebody listens at the path of an IPC endpoint.

    libzmq would take it away from them without a word to anybody.
    """
    if not endpoint.startswith("ipc://"):
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(endpoint.removeprefix("ipc://"))
        except OSError:
            return False  # nobody, or what a killed process has left
        return True


class BadFrameError(ValueError):
    """The frame is not a valid message; str() is one sentence for its sender."""

    def __init__(self, sentence: str, request_id: RequestId | None = None) -> None:
        super().__init__(sentence)
        self.request_id = request_id
        """What the message is about, if so much of it can be read."""


class OtherVersionError(BadFrameError):
    """The sender speaks another version of the protocol."""

    def __init__(self, version: int) -> None:
        super().__init__(
            f"this end speaks protocol version {PROTOCOL_VERSION}, got a message of version "
            f"{version}"
        )
        self.version = version


def client_frame_limit(max_context: int) -> int:
    """Bytes of the longest frame that a client may send to a server with such a context.

    A multiple of what can be of use, so that a prompt somewhat too long is still answered.
    """
    limit = _CLIENT_FRAME_BYTES + _CLIENT_FRAME_BYTES_PER_TOKEN * max_context
    return min(limit, MAX_FRAME_BYTES)


def encode(message: Message) -> bytes:
    """The frame of a message: a version byte, then a msgpack map by field name."""
    return _VERSION_BYTE + _encoder.encode(message)


def encode_refusal(refused: Refused, version: int) -> bytes:
    """The frame of a refusal for a peer of another version, which can read this if nothing else."""
    if (header := _HEADERS.get(version)) is None:
        return encode(refused)
    # With the fields that were known then.
    known = {"type": "Refused", "message": refused.message, "request_id": refused.request_id}
    return header + _encoder.encode(known)


def decode(frame: bytes) -> Message:
    """The message of a frame.

    Raises:
        BadFrameError: too short, too long, another version, unknown type, or a body that is not
            exactly the fields of its message with their types.
    """
    if not frame:
        raise BadFrameError("a frame has at least 1 byte, got 0")
    if len(frame) > MAX_FRAME_BYTES:
        raise BadFrameError(f"a frame has at most {MAX_FRAME_BYTES} bytes, got {len(frame)}")
    if frame[0] != PROTOCOL_VERSION:
        raise OtherVersionError(frame[0])
    body = memoryview(frame)[1:]
    try:
        return _decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _bad_frame(error, body) from None
    except (ValueError, RecursionError) as error:
        raise BadFrameError(f"not a message: {error}") from None


def _bad_frame(error: msgspec.ValidationError, body: memoryview) -> BadFrameError:
    try:
        plain: Any = msgspec.msgpack.decode(body)
    except (ValueError, RecursionError):
        return BadFrameError(str(error))
    sentence = explain(error, plain, Message)
    if not isinstance(plain, dict):
        return BadFrameError(sentence)
    name, request_id = plain.get("type"), plain.get("request_id")
    if isinstance(name, str) and name in _TYPES:
        sentence = f"{name}: {sentence}"
    return BadFrameError(sentence, RequestId(request_id) if isinstance(request_id, str) else None)


class PeerGoneError(Exception):
    """The peer has disconnected."""


class PeerBusyError(Exception):
    """The peer does not read: its buffer is full."""


class Router:
    """A bound ROUTER socket: many peers, nothing that can block."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        buffer: int,
        *,
        unread: int,
        max_frame_bytes: int = MAX_FRAME_BYTES,
        silence_limit_s: float | None = None,
        secret_key: bytes | None = None,
    ) -> None:
        """Bind.

        Args:
            context: of this process.
            endpoint: for example tcp://127.0.0.1:5570; port 0 picks a free one.
            buffer: messages held for a peer that does not read.
            unread: messages held of a peer while they are not read; more wait at the peer.
            max_frame_bytes: a peer that sends a longer frame is cut off.
            silence_limit_s: a peer whose ZeroMQ does not answer for so long counts as gone, as
                when its host is cut off; None: only a closed connection does.
            secret_key: of CURVE; only who has its public key can connect, and nobody can read
                along. None is for everybody.

        Raises:
            OSError: the endpoint cannot be bound; the message names it and says why.
        """
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 1000)
        self.socket.setsockopt(zmq.SNDHWM, buffer)
        self.socket.setsockopt(zmq.RCVHWM, unread)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.socket.setsockopt(zmq.MAXMSGSIZE, max_frame_bytes)
        if secret_key is not None:
            self.socket.curve_server = True
            self.socket.curve_secretkey = secret_key
        if silence_limit_s is not None:
            # Asked and answered by a thread of libzmq, however busy Python is.
            self.socket.setsockopt(zmq.HEARTBEAT_IVL, int(silence_limit_s * 1000 / 4))
            self.socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(silence_limit_s * 1000 * 3 / 4))
        try:
            if _path_is_in_use(endpoint):
                raise zmq.ZMQError(errno.EADDRINUSE)
            _prepare(self.socket, endpoint)
            self.socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.socket.close(linger=0)
            raise OSError(f"cannot listen on {endpoint}: {error.strerror}") from None

    @property
    def endpoint(self) -> str:
        """The bound address, with the port that was picked."""
        return self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    @property
    def has_unread(self) -> bool:
        """Whether something has arrived that `receive` has not yielded."""
        return self.socket.poll(0) != 0

    def send(self, peer: Identity, message: Message) -> None:
        """Send without waiting.

        Raises:
            PeerGoneError: it has disconnected.
            PeerBusyError: its buffer is full; the message was not sent.
        """
        self.send_frame(peer, encode(message))

    def send_frame(self, peer: Identity, frame: bytes) -> None:
        """Do what `send` does, for a message that was encoded before."""
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
