"""Answers about the whole server, which cost more to make than to ask for."""

from __future__ import annotations

from collections.abc import Callable

from fastserve_mega.messaging.frames import encode
from fastserve_mega.messaging.messages import Message

_INTERVAL_S = 0.25
_MOST_NEW = 4
"""Made in an interval whoever asks; after that those that have been made are given again."""


class RecentAnswers:
    """Makes few answers in an interval and gives them to everybody, as frames."""

    def __init__(self) -> None:
        self._frames: dict[str, bytes] = {}
        self._began = 0.0
        self._num_new = 0

    def get(self, question: str, make: Callable[[], Message], now: float) -> bytes:
        """The answer to a question, at most 0.25 s old.

        Args:
            question: names it.
            make: a new answer.
            now: time, seconds.
        """
        if now - self._began >= _INTERVAL_S:
            self._began, self._num_new = now, 0
            self._frames.clear()
        if self._num_new < _MOST_NEW or question not in self._frames:
            self._num_new += 1
            self._frames[question] = encode(make())
        return self._frames[question]
