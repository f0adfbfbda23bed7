"""Filling one step: who takes part, and with how many tokens."""

from __future__ import annotations

from collections.abc import Iterable

from fastserve_mega.config import SchedulerConfig
from fastserve_mega.plan import SequenceSlice
from fastserve_mega.scheduling.memory import KvMemory
from fastserve_mega.scheduling.policy import Policy
from fastserve_mega.scheduling.request import Request


class BatchBuilder:
    """Takes requests by priority until the batch or its tokens are full (backfill).

    A request that finds no memory is passed over. Admission closes for this step when too many
    were passed over, or when one was in too many steps; after that only residents are taken, so
    that the memory which comes free goes to those who waited for it.
    """

    def __init__(self, config: SchedulerConfig, memory: KvMemory, max_requests: int) -> None:
        self.requests: list[Request] = []
        self.slices: list[SequenceSlice] = []
        self._memory = memory
        self._brings_back_ahead = memory.brings_back_ahead
        self._max_requests = max_requests
        self._tokens_left = config.max_batch_tokens
        self._lookahead = config.backfill_lookahead
        self._max_passed_over = config.max_passed_over
        self._admitting = True

    def fill(self, policy: Policy) -> None:
        """Take requests until nothing more fits."""
        self._take(policy.by_priority())
        if not self._admitting and self._has_room():
            self._take(self._memory.residents_by_priority())

    def _has_room(self) -> bool:
        return self._tokens_left > 0 and len(self.requests) < self._max_requests

    def _take(self, candidates: Iterable[Request]) -> None:
        memory, requests, slices = self._memory, self.requests, self.slices
        was_admitting = self._admitting
        for request in candidates:
            if request.in_flight_tokens or request.moving:
                continue
            start = request.computed_tokens
            pending = request.known_tokens - start
            num_tokens = 1
            if pending > 1:
                # A prefill leaves a token to each place behind it: decodes cost it next to
                # nothing, and would wait for the whole chunk.
                places_behind = self._max_requests - len(requests) - 1
                num_tokens = min(pending, max(self._tokens_left - places_behind, 1))
            if request.block_table:
                has_memory = memory.grow(request, start + num_tokens)
            elif start and self._brings_back_ahead:
                continue  # on the host: the planner's business
            else:
                has_memory = memory.make_resident(request, reserve=len(requests))
            if not has_memory:
                self._pass_over(request)
                if self._admitting == was_admitting:
                    continue
                return
            request.in_flight_tokens = num_tokens
            request.passed_over = 0
            requests.append(request)
            slices.append(self._slice(request, start, num_tokens, num_tokens == pending))
            self._tokens_left -= num_tokens
            if not self._tokens_left or len(requests) == self._max_requests:
                return

    @staticmethod
    def _slice(request: Request, start: int, num_tokens: int, samples: bool) -> SequenceSlice:
        told, table = request.told_blocks, request.block_table
        new: tuple[int, ...] = ()
        if told != len(table):
            new = tuple(table[told:])
            request.told_blocks = len(table)
        return SequenceSlice(request.request_id, start, num_tokens, samples, told, new)

    def _pass_over(self, request: Request) -> None:
        request.passed_over += 1
        self._lookahead -= 1
        if self._lookahead < 0 or request.passed_over > self._max_passed_over:
            self._admitting = False
