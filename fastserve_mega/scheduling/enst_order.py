"""Requests in the order of their estimated next scheduled time (ENST)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from fastserve_mega.scheduling.policy import Policy
from fastserve_mega.scheduling.request import Request

_SORT_EVERY_STEPS = 16
_ALWAYS_SORTED = 64
"""Up to this many members are sorted in each step."""


class EnstOrder:
    """A set of requests that can be walked from whoever runs next, or from whoever runs last.

    Large sets are sorted every few steps and not in each: the order changes slowly, and sorting
    thousands would take longer than all the rest of a step. Those who joined since are walked
    after the others, and are not among those who run last.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._members: dict[Request, None] = {}
        self._sorted: list[Request] = []
        self._joined: list[Request] = []
        self._age = _SORT_EVERY_STEPS

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, request: Request) -> bool:
        return request in self._members

    def __iter__(self) -> Iterator[Request]:
        return iter(self._members)

    def add(self, request: Request) -> None:
        self._members[request] = None
        self._joined.append(request)

    def discard(self, request: Request) -> None:
        self._members.pop(request, None)

    def clear(self) -> None:
        self._members.clear()

    def begin_step(self, now: float) -> None:
        """Sort, when it is time to."""
        self._age += 1
        if self._age >= _SORT_EVERY_STEPS or len(self._members) <= _ALWAYS_SORTED:
            self._age = 0
            going_on = (request for request in self._members if not request.ended)
            self._sorted = sorted(going_on, key=self._policy.next_scheduled(now))
            self._joined.clear()

    def soonest_first(self) -> Iterator[Request]:
        """All members; a member that left and came back may be met twice."""
        members = self._members
        return (r for r in chain(self._sorted, self._joined) if r in members)

    def latest_first(self) -> Iterator[Request]:
        """Those who were members when the order was made, and still are."""
        members = self._members
        return (r for r in reversed(self._sorted) if r in members)
