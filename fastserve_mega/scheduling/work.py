"""How long what a scheduler has to do will take; for the choice between replicas."""

from __future__ import annotations

from collections.abc import Iterable

from fastserve_mega.scheduling.cost_model import CostModel
from fastserve_mega.scheduling.events import Arrived
from fastserve_mega.scheduling.kv.prefix_cache import PrefixCache
from fastserve_mega.scheduling.request import Request
from fastserve_mega.system.config import SchedulerConfig


class ExpectedWork:
    """Times by the cost model, of what is at hand and of what would be added to it."""

    def __init__(
        self, config: SchedulerConfig, cost_model: CostModel, prefix_cache: PrefixCache
    ) -> None:
        self._config = config
        self._cost_model = cost_model
        self._prefix_cache = prefix_cache
        self.unread_tokens = 0
        """Tokens that the unfinished requests came with and no step has read."""

    def add(self, request: Request) -> None:
        """Take in a request that arrived, and of which it is known what was cached."""
        request.num_unread_tokens = request.num_tokens - request.kv.num_cached_tokens
        self.unread_tokens += request.num_unread_tokens

    def read(self, request: Request, tokens: int) -> None:
        """Take in that so many tokens of a request, or what it has, need not be read any more."""
        read = min(tokens, request.num_unread_tokens)
        request.num_unread_tokens -= read
        self.unread_tokens -= read

    def check_integrity(self, unfinished: Iterable[Request]) -> None:
        """Raise RuntimeError unless what these have not read is what is counted."""
        if self.unread_tokens != sum(each.num_unread_tokens for each in unfinished):
            raise RuntimeError("the tokens not yet read are miscounted")

    def queued_prefill_s(self) -> float:
        """Time to prefill what no step has read yet."""
        chunk = self._config.max_batch_tokens
        return self.unread_tokens * self._cost_model.prefill_s(chunk) / chunk

    def prefill_s(self, arrived: Arrived) -> float:
        """What the prefill of a request that has not been added would take, less what is cached."""
        tokens = arrived.num_prompt_tokens + arrived.num_received_tokens
        cached = self._prefix_cache.tokens_of(arrived.block_hashes)
        return self._cost_model.prefill_s(max(tokens - cached, 1))

    def decode_s(self, output_tokens: float) -> float:
        """Time of one answer of a mean length in tokens, in full batches.

        It is also about what is left of a request that is being answered, when the lengths are
        exponentially distributed, which forget how much there has been; those of conversations
        nearly are.
        """
        batch = self._config.max_batch_size
        return output_tokens * self._cost_model.decode_s(batch, round(output_tokens)) / batch
