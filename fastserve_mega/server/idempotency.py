"""`Idempotency-Key`: a request that is sent again gets the answer of the first one."""

from __future__ import annotations

import hashlib

from fastapi import Request

from fastserve_mega.server.errors import ApiError
from fastserve_mega.server.middleware import KEY_HEADERS

IDEMPOTENCY_KEY = "Idempotency-Key"
_MAX_LENGTH = 255


async def identity_of(http: Request) -> tuple[str, str]:
    """What a request with the header is known by when it is sent again, to whichever HTTP server.

    Returns:
        Its id, a hash of the key and of who sent it: the keys of two users are never the same
        request. And its fingerprint, a hash of the path and the body.

    Raises:
        ApiError: the header cannot be used.
    """
    key = http.headers[IDEMPOTENCY_KEY]
    if not (1 <= len(key) <= _MAX_LENGTH and key.isascii() and key.isprintable()):
        raise ApiError(
            400,
            f"{IDEMPOTENCY_KEY} must have 1 to {_MAX_LENGTH} printable ASCII characters, "
            f"got {len(key)}",
        )
    sender = (http.headers.get(name, "") for name in KEY_HEADERS)
    fingerprint = _digest(http.url.path, (await http.body()).decode("latin-1"))
    return _digest(*sender, key), fingerprint


def _digest(*parts: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        encoded = part.encode("utf-8", "surrogateescape")
        digest.update(len(encoded).to_bytes(8) + encoded)
    return digest.hexdigest()
