"""Repeat a run from its event log, or under another policy."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastserve_mega.commands.command import FILE, Command, complete_with, fail
from fastserve_mega.commands.options import policy_names


def _replay(options: argparse.Namespace) -> int:
    from fastserve_mega.experiments.replay import run_other_policies, run_replay

    try:
        if not options.policies:
            return run_replay(options.log)
        return run_other_policies(options.log, options.policies, options.json)
    except (ValueError, OSError) as error:
        return fail(options, error)


def _add_replay(parser: argparse.ArgumentParser) -> None:
    log = parser.add_argument("log", type=Path, metavar="LOG", help="what the server wrote")
    parser.add_argument(
        "--policy",
        type=policy_names,
        default=(),
        dest="policies",
        metavar="A,B,…",
        help="simulate the same requests under these policies and compare the latencies",
    )
    json = parser.add_argument(
        "--json", type=Path, metavar="FILE", help="with --policy: write all figures"
    )
    complete_with(log, FILE)
    complete_with(json, FILE)


COMMAND = Command(
    name="replay",
    summary="repeat a run from its event log, or under another policy",
    description="Feeds the file that coordinator.event_log names to a fresh scheduler and "
    "compares every plan byte for byte; ends with status 1 when one differs. With --policy it "
    "simulates the requests of the log instead, with the profile in it, and prints what their "
    "latencies would have been.",
    examples=("events.jsonl", "events.jsonl --policy fcfs,mlfq --json latencies.json"),
    run=_replay,
    add_arguments=_add_replay,
    config="none",
)
