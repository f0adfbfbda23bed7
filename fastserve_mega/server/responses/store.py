"""Conversations that a later request may go on with, in bounded memory."""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from fastserve_mega.server.answers import Json
from fastserve_mega.server.responses.protocol import Message

MAX_BYTES = 64 * 2**20


class ResponseStore:
    """The newest responses of this process, with the conversations that led to them.

    Args:
        max_bytes: of all of them together; the one used longest ago makes room.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._bytes = 0

    def keep(self, response: Json, messages: list[Message]) -> None:
        """Keep a response, and the messages up to its end."""
        data = msgspec.json.encode((response, messages))
        self.delete(response["id"])
        self._kept[response["id"]] = data
        self._bytes += len(data)
        while self._bytes > self._max_bytes:
            self.delete(next(iter(self._kept)))

    def get(self, response_id: str) -> tuple[Json, list[Message]] | None:
        """A response and its messages, if it is kept."""
        if (data := self._kept.get(response_id)) is None:
            return None
        self._kept.move_to_end(response_id)
        response, messages = msgspec.json.decode(data)
        return response, messages

    def delete(self, response_id: str) -> bool:
        """Forget a response; False when it is not kept."""
        data = self._kept.pop(response_id, None)
        self._bytes -= len(data or b"")
        return data is not None
