"""First come, first served: run to completion with continuous batching."""

from __future__ import annotations

from fastserve_mega.scheduling.policies.policy import Policy
from fastserve_mega.scheduling.request import Request


class Fcfs(Policy):
    """Order by arrival; a request's own `priority` comes before that."""

    key_changes = False

    def key(self, request: Request) -> tuple[int, int]:
        return request.priority, request.arrival_number
