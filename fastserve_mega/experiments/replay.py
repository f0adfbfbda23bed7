"""`fastserve-mega replay`: a run repeated from its event log, or under other policies.

Each plan is compared byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from rich.console import Console

from fastserve_mega.coordinator.event_log import StepCall, error_text, read_event_log
from fastserve_mega.experiments.other_policies import (
    Latencies,
    latencies,
    read_recording,
    simulate_policy,
)
from fastserve_mega.plan import Plan
from fastserve_mega.printing import FittedTable
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


_SHOWN = ("mean", "p50", "p95")


def run_replay(log: Path) -> int:
    """Repeat a run and compare its plans; returns the exit status, 1 when one differs.

    Raises:
        ValueError: the file is not an event log.
        OSError: it cannot be read.
    """
    setup, calls = read_event_log(log)
    result = replay(setup.make_scheduler(), calls)
    print(f"{result.equal_plans} of {result.plans} plans equal, {result.calls} calls")
    if (difference := result.difference) is None:
        return 0
    print(f"first difference: call {difference.call}, now {difference.now}")
    print(f"  logged:   {difference.logged}")
    print(f"  replayed: {difference.replayed}")
    return 1


def run_other_policies(log: Path, policies: Sequence[str], json_path: Path | None) -> int:
    """Print the latencies of a log's requests as they were and under each policy; returns 0.

    The policy of the log is simulated too: only simulations are to be compared with each other.

    Raises:
        ValueError: the file is not an event log, or its requests cannot be simulated.
        OSError: it cannot be read, or `json_path` not written.
    """
    setup, calls = read_event_log(log)
    recording = read_recording(calls)
    logged = setup.scheduler.policy
    columns = {f"{logged}, as it was": latencies(recording.records)}
    for policy in dict.fromkeys((logged, *policies)):
        columns[f"{policy}, simulated"] = latencies(simulate_policy(setup, recording, policy))
    console = Console()
    left_out = f", {recording.left_out} without an answer left out" if recording.left_out else ""
    console.print(f"{len(recording.records)} requests{left_out}; seconds", highlight=False)
    console.print(render(columns))
    if json_path is not None:
        figures = {"requests": len(recording.records), "left_out": recording.left_out,
                   "policy": logged, "latencies_s": columns}  # fmt: skip
        json_path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


def render(columns: Mapping[str, Latencies]) -> FittedTable:
    """Draw one column for each run, the first one on the left."""
    table = FittedTable("", *columns)
    measures = next(iter(columns.values()))
    for measure in measures:
        for statistic in _SHOWN:
            figures = (f"{column[measure][statistic]:.3f}" for column in columns.values())
            table.add_row(
                f"{measure} {statistic if statistic == 'mean' else statistic.upper()}", *figures
            )
    return table
