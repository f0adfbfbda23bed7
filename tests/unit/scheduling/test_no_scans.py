"""The work of a step, counted, does not depend on how many requests are queued."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from fixed_costs import arrived, make_scheduler

from fastserve_mega import scheduling
from fastserve_mega.scheduling.events import Aborted, Event, StepDone
from fastserve_mega.scheduling.policies.starvation import StarvationWatch
from fastserve_mega.scheduling.request import Request
from fastserve_mega.scheduling.scheduler import Scheduler
from fastserve_mega.types import RequestId

PACKAGE = str(Path(scheduling.__file__).parent)
FEW, MANY = 2_000, 50_000
STEPS = 12
POINTER_BYTES = 8


class CountedPriority(int):
    """A priority that counts how often it is compared, by whomever: a sort, a search, a heap."""

    comparisons = 0

    def _count(self) -> None:
        CountedPriority.comparisons += 1

    def __lt__(self, other: int) -> bool:
        self._count()
        return int.__lt__(self, other)

    def __eq__(self, other: object) -> bool:
        self._count()
        return int.__eq__(self, other)

    __hash__ = int.__hash__


@dataclass
class Work:
    """What some steps took."""

    instructions: int = 0
    """Of the interpreter, in the scheduler's modules: what a loop over a queue would add to."""
    comparisons: int = 0
    """Of sort keys: what sorting or searching in C would add to."""
    peak_bytes: int = 0
    """Allocated at once in a step: what a copy of a queue would add to."""


def count(work: Work, call: Callable[[], Any]) -> Any:
    """Call, and count the work."""

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if event == "call":
            if not frame.f_code.co_filename.startswith(PACKAGE):
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        elif event == "opcode":
            work.instructions += 1
        return trace

    before, compared = sys.gettrace(), CountedPriority.comparisons
    sys.settrace(trace)
    try:
        result = call()
    finally:
        sys.settrace(before)
    work.comparisons += CountedPriority.comparisons - compared
    return result


def fill(policy: str, queued: int, clients: int) -> Scheduler:
    """A scheduler with a full batch running, and everybody else waiting behind it."""
    scheduler = make_scheduler(
        policy=policy, max_batch_size=8, device_blocks=1000, starvation_limit_s=1e6
    )
    oracle = 50 if policy == "srpt" else None
    scheduler.step(
        0.0,
        [
            arrived(
                f"q{i}", 5 + i % 40, priority=CountedPriority(0), oracle_output_tokens=oracle,
                client=str(i % clients),
            )
            for i in range(queued)
        ],
    )  # fmt: skip
    return scheduler


def run_steps(
    scheduler: Scheduler,
    policy: str,
    steps: range,
    running: tuple[str, ...],
    call: Callable[[Callable[[], Any]], Any],
) -> tuple[str, ...]:
    """In each step somebody finishes, somebody arrives and somebody waiting is aborted."""
    oracle = 50 if policy == "srpt" else None
    for step in steps:
        events: list[Event] = [
            StepDone(step, 1.0, running[:1]),
            arrived(f"new{step}", 3, priority=CountedPriority(0), oracle_output_tokens=oracle),
            Aborted(f"q{500 + step}"),
        ]
        plan = call(lambda step=step, events=events: scheduler.step(step + 1.0, events))
        assert len(plan.batch) == 8
        running = tuple(piece.request_id for piece in plan.batch)
    return running


def measure(policy: str, queued: int, clients: int = 1) -> Work:
    work = Work()
    scheduler = fill(policy, queued, clients)
    steps, more_steps = range(STEPS), range(STEPS, 2 * STEPS)
    running = run_steps(scheduler, policy, steps, ("q0",), lambda call: count(work, call))
    tracemalloc.start()
    try:

        def peak(call: Callable[[], Any]) -> Any:
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            result = call()
            grown = tracemalloc.get_traced_memory()[1] - before
            work.peak_bytes = max(work.peak_bytes, grown)
            return result

        run_steps(scheduler, policy, more_steps, running, peak)
    finally:
        tracemalloc.stop()
    return work


@pytest.mark.parametrize(
    "policy", ["skip_join_mlfq", "paced", "mlfq", "fcfs", "fixed_priority", "srpt"]
)
def test_no_policy_scans_its_queue(policy):
    few, many = measure(policy, FEW), measure(policy, MANY)
    assert few.instructions > 1000
    assert many.instructions < 1.1 * few.instructions
    # A search by halves compares 5 times more often in 25 times as many.
    assert many.comparisons < 2 * few.comparisons + STEPS
    assert many.peak_bytes < MANY * POINTER_BYTES / 2


@pytest.mark.parametrize(("policy", "clients"), [("skip_join_mlfq", 2), ("fcfs", MANY)])
def test_no_step_scans_the_clients_or_their_lines(policy, clients):
    few, many = measure(policy, FEW, min(clients, FEW)), measure(policy, MANY, clients)
    assert many.instructions < 1.3 * few.instructions
    assert many.peak_bytes < MANY * POINTER_BYTES / 2


def test_to_watch_the_same_requests_again_costs_no_more_each_time():
    looks = 0

    def is_candidate(_: Request) -> bool:
        nonlocal looks
        looks += 1
        return True

    watch = StarvationWatch(lambda _: 1.0, is_candidate)
    requests = [Request(RequestId(f"r{i}"), 1, 1, 0, i, 1) for i in range(50)]
    for _ in range(200):
        for request in requests:
            watch.add(request, len(requests))
    assert looks < 3 * 200 * len(requests)


def test_a_decode_that_changes_nothing_is_only_counted():
    """Of those that go on decoding, paced looks at the few whose order a token can change."""
    scheduler = make_scheduler(policy="paced", max_batch_size=64, block_size=64, decode_s=0.02)
    plan = scheduler.step(0.0, [arrived(f"r{i}", 5) for i in range(64)])
    now, works = 0.0, []
    for _ in range(10):
        now += 0.02
        event, work = StepDone(plan.step_id, 0.02), Work()
        plan = count(work, lambda now=now, event=event: scheduler.step(now, [event]))
        works.append(work.instructions)
    assert len(plan.batch) == 64
    assert works[-1] < 200 * 64
