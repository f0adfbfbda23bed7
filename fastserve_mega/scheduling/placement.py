"""Which replica a request goes to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fastserve_mega.scheduling.events import Arrived
from fastserve_mega.scheduling.scheduler import Scheduler

_FIRST_GUESS_TOKENS = 128.0
"""Length of an answer before any has ended."""
_MEMORY = 100
"""Answers over which the mean length is taken."""


class Placer(Protocol):
    """Says which replica a request goes to."""

    def choose(self, arrived: Arrived) -> int:
        """Number of the replica, which has to be told before the next call of `settle`."""

    def settle(self) -> None:
        """The schedulers have been told of all requests that were placed."""

    def observe_finish(self, output_tokens: int) -> None:
        """Learn from the length of an answer that was not cut short."""

    def lose(self, replica: int) -> None:
        """Choose it no more; the last one is not to be lost."""

    def restore(self, replica: int) -> None:
        """Choose it again: its ranks are back, with empty memory."""


class ExpectedWork:
    """How long what a scheduler has to do will take, by its cost model.

    Args:
        scheduler: whose work it is.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def queued_prefill_s(self) -> float:
        """Time to prefill what no step has read yet."""
        chunk = self._scheduler.config.max_batch_tokens
        tokens = self._scheduler.num_unread_tokens
        return tokens * self._scheduler.cost_model.prefill_s(chunk) / chunk

    def prefill_s(self, arrived: Arrived) -> float:
        """What the prefill of a request that has not been added would take, less what is cached."""
        tokens = arrived.num_prompt_tokens + arrived.num_received_tokens
        cached = self._scheduler.memory.prefix_cache.tokens_of(arrived.block_hashes)
        return self._scheduler.cost_model.prefill_s(max(tokens - cached, 1))

    def decode_s(self, output_tokens: float) -> float:
        """Time of one answer of a mean length in tokens, in full batches.

        It is also about what is left of a request that is being answered, when the lengths are
        exponentially distributed, which forget how much there has been; those of conversations
        nearly are.
        """
        batch = self._scheduler.config.max_batch_size
        step_s = self._scheduler.cost_model.decode_s(batch, round(output_tokens))
        return output_tokens * step_s / batch


class Placement:
    """Sends each request to the replica where its first token costs least.

    The cost is the time of the prefills that wait there, `DECODE_WEIGHT` times that of decoding for
    all its unfinished requests, and `PREFILL_WEIGHT` times the prefill of what its cache does not
    have. A decode shares its steps with prefills, so it delays a first token less than they do.
    Prefilling a prefix again delays not only this request but all that come behind it, so it
    weighs more than waiting. The imbalance that this accepts is bounded: nobody waits behind more
    work than the least busy replica has, and the weighted prefill that is saved. Of equals, the
    replica with the lowest number.
    """

    DECODE_WEIGHT = 0.5
    PREFILL_WEIGHT = 2.0

    def __init__(self, schedulers: Sequence[Scheduler]) -> None:
        """One scheduler per replica."""
        self._schedulers = schedulers
        self._work = [ExpectedWork(scheduler) for scheduler in schedulers]
        self._replicas = list(range(len(schedulers)))
        self._output_tokens = _FIRST_GUESS_TOKENS
        self._finished = 0
        self._promised_s = [0.0] * len(schedulers)

    def choose(self, arrived: Arrived) -> int:
        """See `Placer`. Only those are looked at closely that could be chosen for their work."""
        if len(self._replicas) == 1:
            return self._replicas[0]
        output_tokens, work = self._output_tokens, self._work
        work_s = [
            each.queued_prefill_s()
            + self.DECODE_WEIGHT * scheduler.unfinished * each.decode_s(output_tokens)
            + promised_s
            for each, scheduler, promised_s in zip(
                work, self._schedulers, self._promised_s, strict=True
            )
        ]
        chosen, least_s, prefill_s = -1, float("inf"), 0.0
        for replica in sorted(self._replicas, key=work_s.__getitem__):
            if work_s[replica] >= least_s:
                break
            own_s = work[replica].prefill_s(arrived)
            cost_s = work_s[replica] + self.PREFILL_WEIGHT * own_s
            if cost_s < least_s:
                chosen, least_s, prefill_s = replica, cost_s, own_s
        decode_s = work[chosen].decode_s(output_tokens)
        self._promised_s[chosen] += prefill_s + self.DECODE_WEIGHT * decode_s
        return chosen

    def settle(self) -> None:
        self._promised_s = [0.0] * len(self._schedulers)

    def observe_finish(self, output_tokens: int) -> None:
        self._finished = min(self._finished + 1, _MEMORY)
        self._output_tokens += (output_tokens - self._output_tokens) / self._finished

    def lose(self, replica: int) -> None:
        self._replicas.remove(replica)

    def restore(self, replica: int) -> None:
        self._replicas = sorted([*self._replicas, replica])
