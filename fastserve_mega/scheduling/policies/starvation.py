"""Finds the requests that have waited too long, by deadline and not by a scan."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

from fastserve_mega.scheduling.request import Request

_Watched = tuple[float, int, Request]
"""Deadline, arrival number, request."""
_FEW = 16


class StarvationWatch:
    """Requests by the time at which they starve unless they run before.

    A deadline is corrected when it is looked at, not when the request runs: one heap operation
    for each request and limit, not one for each step.

    Args:
        limit_s: how long a request may wait, since it last ran or arrived, until it starves.
        is_candidate: whether a request still belongs here; the others are forgotten.
    """

    def __init__(
        self, limit_s: Callable[[Request], float], is_candidate: Callable[[Request], bool]
    ) -> None:
        self._limit_s = limit_s
        self.is_candidate = is_candidate
        self._heap: list[_Watched] = []
        self._members: set[Request] = set()

    def __contains__(self, request: Request) -> bool:
        return request in self._members

    def add(self, request: Request, live: int) -> None:
        """Watch another request, or one whose deadline has come nearer.

        Args:
            request: a candidate.
            live: about how many there may be to watch.
        """
        self._members.add(request)
        heapq.heappush(self._heap, self._entry(request))
        if len(self._heap) > 2 * live + _FEW:  # O(1) for each push: no request is left there twice
            watched = dict.fromkeys(each for _, _, each in self._heap if self.is_candidate(each))
            self._heap = [self._entry(each) for each in watched]
            heapq.heapify(self._heap)
            self._members = set(watched)

    def _entry(self, request: Request) -> _Watched:
        deadline = request.waiting_since + self._limit_s(request)  # at the soonest: it may run
        return deadline, request.arrival_number, request

    def deadline(self, request: Request, now: float) -> float | None:
        """Return when a request starves unless it runs before; None when it is watched no more.

        Of one that is running that is when it starves unless it runs once more. Nothing may bring
        the deadline of a request nearer, unless it is added again.
        """
        if not self.is_candidate(request):
            return None
        since = now if request.num_scheduled_tokens else request.waiting_since
        return since + self._limit_s(request)

    def next_deadline(self, now: float, until: float = math.inf) -> float | None:
        """Return when the first of them starves; None for never, or not before `until`."""
        heap = self._heap
        while heap:
            deadline, _, request = heap[0]
            if deadline > until:
                return None
            corrected = self.deadline(request, now)
            if corrected is None:
                heapq.heappop(heap)
                self._members.discard(request)
            elif corrected <= deadline:
                return deadline
            else:
                heapq.heapreplace(heap, (corrected, request.arrival_number, request))
        return None

    def pop(self, now: float, lead_s: float = 0.0) -> Request | None:
        """Take out the request that has starved for longest; None when there is none.

        Args:
            now: seconds.
            lead_s: those that will have starved so soon are taken out as well.
        """
        if self.next_deadline(now, now + lead_s) is None:
            return None
        request = heapq.heappop(self._heap)[2]
        self._members.discard(request)
        return request
