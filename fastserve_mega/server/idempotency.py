"""`Idempotency-Key`: a request that is sent again gets the answer of the first one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from fastapi import Request

from fastserve_mega.server.errors import ApiError
from fastserve_mega.server.middleware import KEY_HEADERS

HEADER = "Idempotency-Key"
_MAX_LENGTH = 255


@dataclass(frozen=True, slots=True)
class Repeatable:
    """What a request is known by when it is sent again, to whichever HTTP server."""

    request_id: str
    """Hash of the key and of who sent it: the keys of two users are never the same request."""
    fingerprint: str
    """Hash of the path and the body."""


async def repeatable(http: Request) -> Repeatable | None:
    """What a request with the header is known by; None without it.

    Raises:
        ApiError: the header cannot be used.
    """
    if (key := http.headers.get(HEADER)) is None:
        return None
    if not (1 <= len(key) <= _MAX_LENGTH and key.isascii() and key.isprintable()):
        raise ApiError(
            400,
            f"{HEADER} must have 1 to {_MAX_LENGTH} printable ASCII characters, got {len(key)}",
        )
    return Repeatable(
        _digest(*(http.headers.get(name, "") for name in KEY_HEADERS), key),
        _digest(http.url.path, (await http.body()).decode("latin-1")),
    )


def _digest(*parts: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        encoded = part.encode("utf-8", "surrogateescape")
        digest.update(len(encoded).to_bytes(8) + encoded)
    return digest.hexdigest()
