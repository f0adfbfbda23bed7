"""Which requests are started: only as many as will fit, answers that are still to come included."""

from __future__ import annotations

from enum import Enum

from fastserve_mega.scheduling.kv.pool import BlockPool
from fastserve_mega.scheduling.kv.projection import KvProjection
from fastserve_mega.scheduling.kv.swapper import Swapper
from fastserve_mega.scheduling.policies.queues import RequestQueues
from fastserve_mega.scheduling.request import Place, Request

_REQUESTS_IN_EXCHANGE = 2
"""Requests that room is left for once there is more than the device holds: a request comes back as
a whole while another one leaves, so there must be room for one of them on either side."""


class Admission(Enum):
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
