"""Messages to frames and back: a version byte, then a msgpack map by field name."""

from __future__ import annotations

from typing import Any, get_args

import msgspec

from fastserve_mega.messaging.messages import Message, Refused
from fastserve_mega.records import explain
from fastserve_mega.types import RequestId

PROTOCOL_VERSION = 2
MAX_FRAME_BYTES = 16 * 2**20
"""A frame is refused unread beyond this; the longest prompts of today are far below it."""

_VERSION_BYTE = bytes((PROTOCOL_VERSION,))
_HEADERS = {1: b"\x01\x23"}
"""What a Refused begins with where that is not the version byte alone: version 1 had a number for
each kind of message."""
_TYPES = frozenset(cls.__name__ for cls in get_args(Message))
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(type=Message)


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


def encode(message: Message) -> bytes:
    """The frame of a message."""
    return _VERSION_BYTE + _encoder.encode(message)


def encode_refusal(refused: Refused, version: int) -> bytes:
    """The frame of a refusal for a peer of another version, which can read this if nothing else."""
    return _HEADERS.get(version, _VERSION_BYTE) + _encoder.encode(refused)


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
