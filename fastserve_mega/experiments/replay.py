"""Repeats a run of the live scheduler from its event log, and compares every plan byte for byte."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from fastserve_mega.coordinator.event_log import StepCall, error_text
from fastserve_mega.plan import Plan
from fastserve_mega.scheduling.scheduler import Scheduler


@dataclass(frozen=True)
class Difference:
    """The first call whose answer is another one than in the log."""

    call: int
    """Counted from 1."""
    now: float
    logged: str
    replayed: str


@dataclass(frozen=True)
class Replay:
    """How many plans came out as logged."""

    calls: int
    plans: int
    """Plans that the log has."""
    equal_plans: int
    difference: Difference | None


def replay(scheduler: Scheduler, calls: Iterable[StepCall]) -> Replay:
    """Feed the calls of a log to a fresh scheduler, up to its end or to the first error."""
    count = plans = equal = 0
    difference = None
    for call in calls:
        count += 1
        plans += call.plan is not None
        plan, error = _step(scheduler, call)
        logged, replayed = _answer(call.plan, call.error), _answer(plan, error)
        if logged == replayed:
            equal += call.plan is not None
        elif difference is None:
            difference = Difference(count, call.now, logged.decode(), replayed.decode())
        if error is not None:
            break  # its state is not to be relied on any more, and the live run ended here too
    return Replay(count, plans, equal, difference)


def _step(scheduler: Scheduler, call: StepCall) -> tuple[Plan | None, str | None]:
    try:
        return scheduler.step(call.now, call.events), None
    except Exception as error:
        return None, error_text(error)


def _answer(plan: Plan | None, error: str | None) -> bytes:
    return error.encode() if error is not None else msgspec.json.encode(plan)
