"""First come, first served: run to completion with continuous batching."""

from __future__ import annotations

from fastserve_mega.scheduling.policies.policy import Policy, head_started
from fastserve_mega.scheduling.request import Request


class Fcfs(Policy):
    """Order by arrival; each step of `priority` is a head start of `HEAD_START_S`."""

    key_changes = False

    def key(self, request: Request) -> tuple[float, int]:
        if request.priority:
            return head_started(request), request.arrival_number
        return request.offered_at, request.arrival_number
