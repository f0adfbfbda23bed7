"""What must hold of blocks, and of a request in each status; checked after every unit test."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fastserve_mega.scheduling.kv.manager import KvManager
from fastserve_mega.scheduling.policies.queues import RequestQueues
from fastserve_mega.scheduling.request import Place, Request, RequestStatus


def validate_blocks(memory: KvManager, queues: RequestQueues) -> None:
    """Raise RuntimeError unless each block is free or has exactly the owners it should have."""
    walk, copies = queues.walk, list(memory.copies.outstanding)
    owners = [*walk(Place.RESIDENT), *walk(Place.SWAPPED), *memory.unreleased]
    device = [block for owner in owners for block in owner.kv.block_table]
    device += [block for copy in copies for block in copy.leaving]
    memory.device.check_integrity(device)
    host = [block for owner in owners for block in owner.kv.host_table]
    host += [block for copy in copies for block in copy.host_blocks]
    memory.host.check_integrity(host)


def validate_all(
    unfinished: Collection[Request],
    queued: Sequence[Request],
    in_steps: Sequence[Request],
    block_size: int,
) -> None:
    """Raise RuntimeError when a request contradicts its status, or is where it should not be."""
    if set(queued) != set(unfinished) or len(queued) != len(unfinished):
        raise RuntimeError("the policy's queues and the unfinished requests differ")
    if len(set(in_steps)) != len(in_steps):
        raise RuntimeError("a request is in two steps at once")
    for request in {*in_steps, *queued}:
        validate(request, block_size, in_step=request in in_steps)


def validate(request: Request, block_size: int, *, in_step: bool) -> None:
    """Raise RuntimeError when a request contradicts its status.

    Args:
        request: any.
        block_size: tokens of a KV block.
        in_step: whether a dispatched step has it.
    """
    kv, status = request.kv, request.status
    device = len(kv.block_table) * block_size
    host = len(kv.host_table) * block_size
    computed = request.num_computed_tokens
    holds = {
        "it computes outside of a step": bool(request.num_scheduled_tokens) == in_step,
        "it computes beyond its tokens": computed + request.num_scheduled_tokens
        <= request.num_tokens,
        "more blocks are clean than were copied": kv.num_clean_blocks <= len(kv.host_table),
        "the workers know more blocks than it has": kv.num_sent_blocks <= len(kv.block_table)
        or not kv.block_table,
    }
    if computed < request.steady_until:
        holds["a step cannot only count it"] = (
            status in (RequestStatus.READY, RequestStatus.RUNNING)
            and request.num_pending_tokens == 1
            and not request.num_unread_tokens
            and request.has_progressed
            and not request.num_passed_over
            and request.steady_until <= device
            and kv.num_sent_blocks == len(kv.block_table)
        )
    match status:
        case RequestStatus.WAITING:
            holds["it waits with KV"] = not kv.block_table and not kv.host_table and not computed
            holds["its blocks are copied though it has none"] = kv.num_copies == 0
        case RequestStatus.READY:
            holds["its KV is not on the device"] = bool(kv.block_table) and device >= computed
        case RequestStatus.RUNNING:
            holds["no step has it"] = in_step
            room = computed + request.num_scheduled_tokens
            holds["it computes without blocks"] = device >= room
        case RequestStatus.SWAPPING_OUT:
            holds["nothing is copied"] = kv.num_copies > 0
            holds["it is on the host only in part"] = not kv.block_table and host >= computed > 0
        case RequestStatus.SWAPPED:
            holds["it is on the host only in part"] = not kv.block_table and host >= computed > 0
        case RequestStatus.SWAPPING_IN:
            holds["nothing is copied"] = kv.num_copies > 0
            holds["it has no room on the device"] = device >= request.num_tokens
        case RequestStatus.FINISHED:
            holds["nothing uses it any more"] = in_step or kv.num_copies > 0
    for complaint, is_so in holds.items():
        if not is_so:
            raise RuntimeError(f"request {request.request_id} is {status.name}, but {complaint}")
