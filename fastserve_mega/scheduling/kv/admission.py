"""Which requests are started: only as many as will fit, answers that are still to come included."""

from __future__ import annotations

import math
from enum import Enum

from fastserve_mega.scheduling.kv.pool import BlockPool
from fastserve_mega.scheduling.kv.swapper import Swapper
from fastserve_mega.scheduling.policies.queues import RequestQueues
from fastserve_mega.scheduling.request import Place, Request

_FIRST_GUESS_TOKENS = 128.0
"""Length of an answer before any has ended."""
_MEMORY = 200
"""Answers over which their length is averaged."""
_MARGIN_IN_BATCH = 0.5
_MARGIN_BEYOND = 3.0
"""Standard deviations kept free, since lengths differ. While all that is started fits into a batch,
an empty place in it costs more than to compute some KV again now and then; beyond, nothing is
lost by waiting."""

_REQUESTS_IN_EXCHANGE = 2
"""Requests that room is left for once there is more than the device holds: a request comes back as
a whole while another one leaves, so there must be room for one of them on either side."""


class KvProjection:
    """Predicts the peak of the KV of requests that run together, from the answers before.

    Each of them is taken to get R more tokens, uniform between 0 and twice the mean length m of
    an answer. After t tokens more, a share of 1 - t/2m of them is left, with t tokens more than
    their mean c of now: together (1 - t/2m)(c + t), which is largest at t = m - c/2 and then is
    (2m + c)² / 8m. Where c is above 2m more KV comes free than is added, and the peak is now.
    """

    def __init__(self, max_batch_size: int) -> None:
        self._max_batch_size = max_batch_size
        self._tokens = _FIRST_GUESS_TOKENS
        self._answers = 1.0

    def observe(self, tokens: int, answers: int) -> None:
        """Learn from a step.

        Tokens for each answer that ended is the mean length also while most are under way (the
        estimate for censored lifetimes): of answers that share their time the short ones end
        first, and a mean over those alone would be far too low.

        Args:
            tokens: sampled.
            answers: that ended with one of them.
        """
        self._tokens += tokens
        if answers:
            kept = max(1.0 - answers / _MEMORY, 0.0)
            self._tokens *= kept
            self._answers = self._answers * kept + answers

    @property
    def mean_tokens(self) -> float:
        """Length of an answer."""
        return self._tokens / self._answers

    def peak_tokens(self, requests: int, tokens: float, max_tokens: int) -> float:
        """Predict the largest amount of KV, with a margin.

        Args:
            requests: that are started, at least one.
            tokens: whose KV they have now, all together.
            max_tokens: the longest answer that they may ask for.
        """
        mean = min(self.mean_tokens, max_tokens)
        now = tokens / requests
        peak = now if now >= 2 * mean else (2 * mean + now) ** 2 / (8 * mean)
        margin = _MARGIN_IN_BATCH if requests <= self._max_batch_size else _MARGIN_BEYOND
        # The standard deviation of a uniform distribution of this mean is mean / √3.
        return requests * peak + margin * math.sqrt(requests / 3) * mean


class MemoryOutcome(Enum):
    """What became of a request that asked for memory."""

    READY = 0
    """It can run in this step."""
    COMING = 1
    """It has to wait for nothing but a copy or a step that is under way."""
    NO_MEMORY = 2
    NOT_STARTED = 3
    """The KV would not fit beside that of the started ones in the end."""


class StartedRequests:
    """Bounds the KV that all started requests are expected to come to.

    Time sharing among more than fits would only drop KV and compute it again. A request that was
    dropped all the same is still one of the started: its room is not given to others, and it
    comes back before all that were never started.

    Args:
        queues: of the scheduler's requests.
        device: pool of device blocks.
        swapper: knows what is swapped or dropped.
        projection: of what the started come to.
        limit_blocks: on device and host together; None for no limit.
        block_size: tokens of a block.
    """

    def __init__(
        self,
        *,
        queues: RequestQueues,
        device: BlockPool,
        swapper: Swapper,
        projection: KvProjection,
        limit_blocks: int | None,
        block_size: int,
    ) -> None:
        self.projection = projection
        self._queues = queues
        self._device = device
        self._swapper = swapper
        self._limit_blocks = limit_blocks
        self._block_size = block_size

    @property
    def returning(self) -> tuple[Request, ...]:
        """The dropped requests, which come before all that wait; none without a limit."""
        return () if self._limit_blocks is None else tuple(self._swapper.dropped)

    def may_start(self, request: Request, blocks: int, *, leaves_room: bool) -> bool:
        """Whether a request that takes so many blocks now will fit beside all that is started.

        One request is always started, else none could be.

        Args:
            request: without KV.
            blocks: that it takes now.
            leaves_room: the host is left to others, who come before it.
        """
        swapper = self._swapper
        if self._limit_blocks is None or request in swapper.dropped:
            return True
        count = self._queues.count
        started = count(Place.RESIDENT) + count(Place.SWAPPED) + len(swapper.dropped)
        if not started:
            return True
        device = self._device
        on_device = device.capacity - device.free_count - swapper.copies.leaving_blocks
        now = on_device + swapper.num_swapped_blocks + swapper.num_dropped_blocks + blocks
        tokens = now * self._block_size
        peak = self.projection.peak_tokens(started + 1, tokens, request.max_tokens)
        if now > device.capacity:
            own = blocks * self._block_size
            peak += _REQUESTS_IN_EXCHANGE * max(peak / (started + 1), own)
        limit_blocks = device.capacity if leaves_room else self._limit_blocks
        return peak <= limit_blocks * self._block_size
