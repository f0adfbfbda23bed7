"""Policies that are a sort key and nothing more."""

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


class FixedPriority(Policy):
    """Order by prompt length, the shortest first, for as long as a request lives."""

    key_changes = False

    def key(self, request: Request) -> tuple[int, int, int]:
        return request.priority, request.num_prompt_tokens, request.arrival_number

    def line_key(self, request: Request) -> tuple[int, int, int]:
        return self.key(request)


class Srpt(Policy):
    """Shortest remaining processing time, by the true output length: for the simulator only."""

    def key(self, request: Request) -> tuple[int, float, int]:
        if request.oracle_output_tokens is None:
            raise ValueError(
                "policy srpt needs the true output length of each request, which only the "
                f"simulator knows; request {request.request_id} came without"
            )
        total = request.num_prompt_tokens + request.oracle_output_tokens
        decodes = max(total - request.num_tokens - 1, 0)
        work_s = decodes * self.cost_model.decode_s(1, request.num_tokens)
        if request.num_pending_tokens > 1:
            work_s += self.cost_model.prefill_s(request.num_pending_tokens)
        return request.priority, work_s, request.arrival_number

    def line_key(self, request: Request) -> tuple[int, float, int]:
        return self.key(request)
