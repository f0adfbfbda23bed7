"""Messages to frames and back: version byte, kind byte, then a msgpack map by field name."""

from __future__ import annotations

from typing import Any

import msgspec

from fastserve_mega.messaging.messages import KIND_OF, Kind, Message
from fastserve_mega.strict import from_plain

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 16 * 2**20
"""A frame is refused unread beyond this; the longest prompts of today are far below it."""

_TYPE_OF: dict[int, Any] = {kind.value: cls for cls, kind in KIND_OF.items()}
_HEADER_BYTES = 2
_encoder = msgspec.msgpack.Encoder()
_trusted_decoders = {
    kind: msgspec.msgpack.Decoder(type=cls, strict=True) for kind, cls in _TYPE_OF.items()
}


class BadFrameError(ValueError):
    """The frame is not a valid message; str() is one sentence for its sender."""


def encode(message: Message) -> bytes:
    """The frame of a message."""
    return bytes((PROTOCOL_VERSION, KIND_OF[type(message)])) + _encoder.encode(message)


def decode(frame: bytes, *, trusted: bool = False) -> Message:
    """The message of a frame.

    Args:
        frame: as `encode` makes it.
        trusted: skip the search for unknown fields; for frames of our own workers.

    Raises:
        BadFrameError: too short, too long, wrong version, unknown kind, or a body that is not
            exactly the fields of its message with their types.
    """
    if len(frame) < _HEADER_BYTES:
        raise BadFrameError(f"a frame has at least {_HEADER_BYTES} bytes, got {len(frame)}")
    if len(frame) > MAX_FRAME_BYTES:
        raise BadFrameError(f"a frame has at most {MAX_FRAME_BYTES} bytes, got {len(frame)}")
    version, kind = frame[0], frame[1]
    if version != PROTOCOL_VERSION:
        raise BadFrameError(
            f"this server speaks protocol version {PROTOCOL_VERSION}, got {version}"
        )
    if kind not in _TYPE_OF:
        raise BadFrameError(f"unknown message kind {kind}")
    body = memoryview(frame)[_HEADER_BYTES:]
    try:
        if trusted:
            return _trusted_decoders[kind].decode(body)  # type: ignore[no-any-return]
        return from_plain(msgspec.msgpack.decode(body), _TYPE_OF[kind])  # type: ignore[no-any-return]
    except (ValueError, RecursionError) as error:
        raise BadFrameError(f"{Kind(kind).name.lower()}: {error}") from None
