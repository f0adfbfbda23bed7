"""Shortest remaining processing time: an oracle, for the simulator only."""

from __future__ import annotations

from fastserve_mega.scheduling.policies.policy import Policy
from fastserve_mega.scheduling.request import Request


class Srpt(Policy):
    """Order by the seconds of work left, from the true output length."""

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
