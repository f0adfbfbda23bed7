"""What a request may ask for besides its prompt and how to sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict


class RequestOptions(TypedDict, total=False):
    """Keyword arguments of `generate`, `chat` and `submit`; also a dictionary to keep and reuse.

    `options: RequestOptions = {"priority": 1}`, then `client.chat(messages, **options)`.
    """

    stop: str | Sequence[str] | None
    """A string, or strings, before which the answer ends; None: no such string."""
    priority: int
    """0 is normal and the default, lower is sooner."""
    cache_salt: str
    """KV is shared among requests with the same salt only; empty by default."""
    timeout_s: float | None
    """End with finish reason `timeout` when unfinished after this many seconds; None: no limit."""
    client: str
    """Who asks: the server is shared among clients by what they were served. Empty by default,
    which is this connection."""
    weight: float
    """The client's share is in proportion to this; 1 by default."""
    expected_output_tokens: int | None
    """How long the answer will be, as far as is known; None by default. The scheduler learns how
    good such hints are, and a wrong one costs nobody much."""
    session: str
    """Requests with the same one, of an agent for example, share the service they attained: a long
    session comes after a short one where not all can be served at once. Empty by default: none."""
    request_id: str | None
    """Unique among the server's unfinished requests; None draws one."""
    fingerprint: str
    """With a `request_id`: whoever asks the same again with both is given the answer from its
    start, with the tokens that were computed, up to a minute after its end. The same id with
    another fingerprint is refused. Empty by default: nobody may."""
