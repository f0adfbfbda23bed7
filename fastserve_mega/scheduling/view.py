"""What a scheduler is doing, for those who watch. Looks only, and not at everybody."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from fastserve_mega.scheduling.kv.manager import KvManager
from fastserve_mega.scheduling.kv.pool import BlockPool
from fastserve_mega.scheduling.policies.policy import Policy
from fastserve_mega.scheduling.request import Place, Request
from fastserve_mega.snapshot import KvPlace, PoolView, ReplicaView, RequestView

_PLACES: dict[Place, KvPlace] = {
    Place.WAITING: "waiting",
    Place.RESIDENT: "resident",
    Place.SWAPPED: "swapped",
}


def view_replica(
    policy: Policy,
    memory: KvManager,
    steps_in_flight: Iterable[list[Request]],
    now: float,
    max_requests: int,
) -> ReplicaView:
    """See `ReplicaView`; the time it takes grows with `max_requests`, not with the queue."""
    steps = list(steps_in_flight)
    running = [request for batch in steps for request in batch if not request.is_finished]
    first = policy.queues.merged((Place.WAITING, Place.RESIDENT, Place.SWAPPED), max_requests)
    shown = list(dict.fromkeys((*running, *islice(first, max_requests))))[:max_requests]
    cache = memory.prefix_cache
    return ReplicaView(
        levels=policy.queues.level_lengths(),
        quanta_s=policy.level_quanta_s,
        requests=tuple(_view_request(request, now) for request in shown),
        device=_view_pool(memory.device),
        host=_view_pool(memory.host),
        steps_in_flight=len(steps),
        preemptions=memory.swapper.preemptions,
        swapped_out_blocks=memory.copies.swapped_out_blocks,
        swapped_in_blocks=memory.copies.swapped_in_blocks,
        recomputed_tokens=memory.swapper.recomputed_tokens,
        prefix_queried_tokens=cache.queried_tokens,
        prefix_hit_tokens=cache.hit_tokens,
        level_names=policy.level_names,
    )


def _view_request(request: Request, now: float) -> RequestView:
    running = request.num_scheduled_tokens > 0
    return RequestView(
        request_id=request.request_id,
        level=request.queue.level,
        place=_PLACES[request.place],
        running=running,
        num_prompt_tokens=request.num_prompt_tokens,
        num_output_tokens=request.num_tokens - request.num_prompt_tokens,
        num_computed_tokens=request.num_computed_tokens,
        waited_s=0.0 if running else max(now - request.waiting_since, 0.0),
    )


def _view_pool(pool: BlockPool) -> PoolView:
    return PoolView(
        owned=pool.capacity - pool.free_count, cached=pool.kept_count, capacity=pool.capacity
    )
