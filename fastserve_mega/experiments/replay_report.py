"""`fastserve-mega replay`: what it prints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from fastserve_mega.coordinator.event_log import read_event_log
from fastserve_mega.experiments.other_policies import (
    Latencies,
    latencies,
    read_recording,
    simulate_policy,
)
from fastserve_mega.experiments.replay import replay
from fastserve_mega.printing import FittedTable

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
