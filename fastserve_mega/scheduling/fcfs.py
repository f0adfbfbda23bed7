"""First come, first served: run to completion with continuous batching."""

from __future__ import annotations

from fastserve_mega.scheduling.policy import SortedPolicy
from fastserve_mega.scheduling.request import Request


class Fcfs(SortedPolicy):
    """By arrival; a request's own `priority` comes before that."""

    def __init__(self) -> None:
        super().__init__(_arrival, key_changes=False)


def _arrival(request: Request) -> tuple[int, int]:
    return request.priority, request.arrival_number
