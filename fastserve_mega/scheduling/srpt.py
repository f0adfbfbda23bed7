"""Shortest remaining processing time: an oracle, for the simulator only."""

from __future__ import annotations

from fastserve_mega.scheduling.cost_model import CostModel
from fastserve_mega.scheduling.policy import SortedPolicy
from fastserve_mega.scheduling.request import Request


class Srpt(SortedPolicy):
    """By the seconds of work left, from the true output length."""

    def __init__(self, cost_model: CostModel) -> None:
        def remaining_s(request: Request) -> tuple[int, float, int]:
            if request.oracle_output_tokens is None:
                raise ValueError(
                    "policy srpt needs the true output length of each request, which only the "
                    f"simulator knows; request {request.request_id} came without"
                )
            total = request.prompt_tokens + request.oracle_output_tokens
            decodes = max(total - request.known_tokens - 1, 0)
            work_s = decodes * cost_model.decode_s(1, request.known_tokens)
            if request.pending_tokens > 1:
                work_s += cost_model.prefill_s(request.pending_tokens)
            return request.priority, work_s, request.arrival_number

        super().__init__(remaining_s, key_changes=True)
