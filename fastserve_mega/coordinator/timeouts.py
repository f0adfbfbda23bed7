"""When requests run out of their time."""

from __future__ import annotations

import heapq
import itertools

from fastserve_mega.types import RequestId

_MORE_THAN_NEEDED = 64


class Timeouts:
    """The deadlines of unfinished requests, on any clock that does not go back.

    Most requests end long before their deadline, so entries of the heap become worthless; they are
    removed when they are more than those that count, which costs nothing on average.
    """

    def __init__(self) -> None:
        self._entries: dict[RequestId, tuple[float, int, RequestId]] = {}
        self._heap: list[tuple[float, int, RequestId]] = []
        self._numbers = itertools.count()

    def add(self, request_id: RequestId, deadline: float) -> None:
        """Watch a request that is not watched yet."""
        entry = (deadline, next(self._numbers), request_id)
        self._entries[request_id] = entry
        heapq.heappush(self._heap, entry)

    def remove(self, request_id: RequestId) -> None:
        """It ended; nothing happens when it has no deadline."""
        if self._entries.pop(request_id, None) is None:
            return
        if len(self._heap) > 2 * len(self._entries) + _MORE_THAN_NEEDED:
            self._heap = sorted(self._entries.values())

    def next_deadline(self) -> float | None:
        """Of all that are watched."""
        self._drop_ended()
        return self._heap[0][0] if self._heap else None

    def take_overdue(self, now: float) -> list[RequestId]:
        """Those whose deadline has come, the earliest first; they are watched no more."""
        overdue = []
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            request_id = heapq.heappop(self._heap)[2]
            del self._entries[request_id]
            overdue.append(request_id)
        return overdue

    def _drop_ended(self) -> None:
        heap = self._heap
        while heap and self._entries.get(heap[0][2]) is not heap[0]:
            heapq.heappop(heap)
