"""A server runs for months: what has ended must be forgotten."""

import gc

import pytest
from fixed_costs import arrived, make_scheduler

from fastserve_mega.scheduling.events import CopyDone, StepDone
from fastserve_mega.scheduling.request import Request
from fastserve_mega.system.config import SwapConfig

AT_ONCE = 6
ROUNDS = 60


CASES = [
    (policy, strategy)
    for policy in ("skip_join_mlfq", "paced", "mlfq", "fcfs", "fixed_priority")
    for strategy in ("proactive", "reactive", "recompute", "none")
]


@pytest.mark.parametrize(("policy", "strategy"), CASES)
def test_ended_requests_are_forgotten(policy, strategy):
    """Always a few requests, most of them preempted, until hundreds have ended."""
    scheduler = make_scheduler(
        policy=policy,
        device_blocks=16,
        host_blocks=100,
        max_batch_size=3,
        starvation_limit_s=5.0,
        swap=SwapConfig(strategy=strategy),
    )
    lengths = {f"r{i}": 6 + i % 7 for i in range(AT_ONCE * ROUNDS)}
    left: dict[str, int] = {}
    waiting = list(lengths)
    events = []
    now = 0.0
    while waiting or left:
        while waiting and len(left) < AT_ONCE:
            name = waiting.pop()
            left[name] = lengths[name]
            events.append(arrived(name, 5 + len(waiting) % 9, 20))
        plan = scheduler.step(now, events)
        events = []
        now += 1.0
        for copy in plan.copies if plan else ():
            events.append(CopyDone(copy.copy_id))
        if plan and plan.batch:
            events.append(StepDone(plan.step_id, 1.0, _sample(plan, left)))
    gc.collect()
    known = sum(type(each) is Request for each in gc.get_objects())
    assert scheduler.memory.swapper.preemptions > 0 or strategy == "none" or policy == "fcfs"
    assert known <= 10 * AT_ONCE


def _sample(plan, left):
    """Who yields a token in this step, and of those who is finished."""
    finished = []
    for piece in plan.batch:
        if piece.samples:
            left[piece.request_id] -= 1
            if not left[piece.request_id]:
                finished.append(piece.request_id)
                del left[piece.request_id]
    return tuple(finished)
