"""Gives memory back to the system after a crowd has left."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

_WORTH_TOKENS = 1_000_000
"""A queue is worth the trouble when so many prompt tokens of it have gone: some megabytes."""
_LEFT_SHARE = 0.5
"""The rest of it is less than this."""


class HeapTrimmer:
    """Has the C library return what is free, once most of a long queue has gone.

    It keeps what is freed for later: what a full queue took would stay with the process for ever.

    Args:
        trim: does that; None takes glibc's, and nothing where there is another library.
    """

    def __init__(self, trim: Callable[[], object] | None = None) -> None:
        self._trim = trim or _find_trim()
        self._most = 0
        """Most tokens since the last time."""

    def observe(self, tokens: int) -> None:
        """Take in how many prompt tokens wait; trim where that is worth it."""
        self._most = max(self._most, tokens)
        if self._most - tokens > _WORTH_TOKENS and tokens < _LEFT_SHARE * self._most:
            self._most = tokens
            self._trim()


def _find_trim() -> Callable[[], object]:
    try:
        malloc_trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return lambda: None
    return lambda: malloc_trim(ctypes.c_size_t(0))
