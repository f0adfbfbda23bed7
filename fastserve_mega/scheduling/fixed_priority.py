"""Fixed priority by prompt length, preemptive: the paper's second baseline (section 6.3)."""

from __future__ import annotations

from fastserve_mega.scheduling.policy import SortedPolicy
from fastserve_mega.scheduling.request import Request


class FixedPriority(SortedPolicy):
    """Shortest prompt first, for as long as a request lives."""

    def __init__(self) -> None:
        super().__init__(_prompt_length, key_changes=False)


def _prompt_length(request: Request) -> tuple[int, int, int]:
    return request.priority, request.prompt_tokens, request.arrival_number
