"""Fixed priority by prompt length, preemptive: the paper's second baseline (section 6.3)."""

from __future__ import annotations

from fastserve_mega.scheduling.policies.policy import Policy
from fastserve_mega.scheduling.request import Request


class FixedPriority(Policy):
    """Order by prompt length, the shortest first, for as long as a request lives."""

    key_changes = False

    def key(self, request: Request) -> tuple[int, int, int]:
        return request.priority, request.num_prompt_tokens, request.arrival_number

    def line_key(self, request: Request) -> tuple[int, int, int]:
        return self.key(request)
