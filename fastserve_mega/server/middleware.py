"""Who may ask, under which id, and how much: around the application, and what headers say."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections import deque

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastserve_mega.server.api_keys import ApiKeys, KeyHolder
from fastserve_mega.server.errors import ApiError

_BODY_BYTES = 2**20
_BODY_BYTES_PER_TOKEN = 64
"""Enough for text of any script with each character escaped, and for token ids."""
_GUARDED = ("/v1/", "/tokenize", "/detokenize")
"""What computes or tells about texts. Health, metrics and the live view stay open."""
_KEY_HEADERS = _BEARER, _PLAIN = ("Authorization", "X-Api-Key")
"""Where the key of a user is; the second is that of Anthropic's clients."""
REQUEST_ID = "X-Request-Id"
_MAX_ID_LENGTH = 128
IDEMPOTENCY_KEY = "Idempotency-Key"
"""A request that is sent again with it gets the answer of the first one."""
_MAX_KEY_LENGTH = 255


class RequireKey:
    """Answers with 401 what comes without one of the keys as `Authorization: Bearer KEY`.

    What comes with one is told whose it is, in `state.key_holder`.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        guarded = scope["type"] == "http" and scope["path"].startswith(_GUARDED)
        # A browser asks with OPTIONS, without a key, whether it may send one.
        if not guarded or scope["method"] == "OPTIONS":
            await self._app(scope, receive, send)
            return
        if (holder := self._holder(Headers(scope=scope))) is not None:
            scope.setdefault("state", {})["key_holder"] = holder
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401,
            "an API key is required, as the header Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error.response(scope["path"])(scope, receive, send)

    def _holder(self, headers: Headers) -> KeyHolder | None:
        kind, _, given = headers.get(_BEARER, "").partition(" ")
        if key := headers.get(_PLAIN):
            kind, given = "bearer", key
        return self._keys.find(given.strip()) if kind.lower() == "bearer" else None


class NameRequests:
    """Gives every answer an X-Request-Id: the client's own, or a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        usable = 0 < len(given) <= _MAX_ID_LENGTH and given.isascii() and given.isprintable()
        request_id = given if usable else uuid.uuid4().hex

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        await self._app(scope, receive, named)


def body_limit(max_context: int) -> int:
    """Bytes of the longest body that can be of use where the context has so many tokens."""
    return _BODY_BYTES + _BODY_BYTES_PER_TOKEN * max_context


class Turns:
    """Lets one waiter pass in each turn of the event loop, in the order in which they came."""

    def __init__(self) -> None:
        self._line: deque[asyncio.Future[None]] = deque()

    async def take(self) -> None:
        """Wait for one's own."""
        loop = asyncio.get_running_loop()
        self._line.append(turn := loop.create_future())
        if len(self._line) == 1:
            loop.call_soon(self._next)
        await turn

    def _next(self) -> None:
        turn = self._line.popleft()
        if not turn.done():  # who waited may have gone
            turn.set_result(None)
        if self._line:
            turn.get_loop().call_soon(self._next)


class LimitBody:
    """Refuses a body that says it is too long, or as soon as it has become so.

    A compressed one at once: what it would become is not known. When many have become complete at
    once, one is looked at in each turn of the event loop: running streams come in between.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit
        self._turns = Turns()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = 0
        if scope["type"] == "http" and (coding := _content_coding(scope)) != "identity":
            error = ApiError(
                415, f"bodies are taken as they are, got one with Content-Encoding: {coding}"
            )
            await error.response(scope["path"])(scope, receive, send)
            return

        async def limited() -> Message:
            nonlocal size
            self._check(int(Headers(scope=scope).get("Content-Length", 0)))
            message = await receive()  # what a client that expects 100 Continue waits for
            size += len(message.get("body", b""))
            self._check(size)
            if not message.get("more_body") and size:
                await self._turns.take()
            return message

        await self._app(scope, limited if scope["type"] == "http" else receive, send)

    def _check(self, size: int) -> None:
        if size > self._limit:
            raise HTTPException(
                413, f"the body is longer than {self._limit} bytes (server.max_body_bytes)"
            )


def _content_coding(scope: Scope) -> str:
    return Headers(scope=scope).get("Content-Encoding", "").strip().lower() or "identity"


async def identity_of(http: Request) -> tuple[str, str]:
    """What a request with the header is known by when it is sent again, to whichever HTTP server.

    Returns:
        Its id, a hash of the key and of who sent it: the keys of two users are never the same
        request. And its fingerprint, a hash of the path and the body.

    Raises:
        ApiError: the header cannot be used.
    """
    key = http.headers[IDEMPOTENCY_KEY]
    if not (1 <= len(key) <= _MAX_KEY_LENGTH and key.isascii() and key.isprintable()):
        raise ApiError(
            400,
            f"{IDEMPOTENCY_KEY} must have 1 to {_MAX_KEY_LENGTH} printable ASCII characters, "
            f"got {len(key)}",
        )
    sender = (http.headers.get(name, "") for name in _KEY_HEADERS)
    fingerprint = _digest(http.url.path, (await http.body()).decode("latin-1"))
    return _digest(*sender, key), fingerprint


def _digest(*parts: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        encoded = part.encode("utf-8", "surrogateescape")
        digest.update(len(encoded).to_bytes(8) + encoded)
    return digest.hexdigest()
