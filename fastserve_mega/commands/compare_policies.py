"""compare-policies: every policy on a standing set of workloads."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import get_args

from fastserve_mega.commands.command import (
    DIRECTORY,
    FILE,
    Command,
    complete_with,
    fail,
)
from fastserve_mega.commands.options import add_slo, policy_names, positive, positive_list
from fastserve_mega.system.config import PolicyName


def _compare(options: argparse.Namespace) -> int:
    from fastserve_mega.experiments.compare_policies import CompareOptions, run_comparison
    from fastserve_mega.experiments.standing_set import STANDING_SET
    from fastserve_mega.scheduling.policies import find_policy

    try:
        for name in options.policies:
            find_policy(name)
        return run_comparison(
            CompareOptions(
                policies=tuple(dict.fromkeys(options.policies)),
                workloads=options.workloads or tuple(each.name for each in STANDING_SET),
                loads=tuple(dict.fromkeys(options.loads)),
                seeds=options.seeds,
                quick=options.quick,
                jobs=options.jobs,
                json_path=options.json,
                data=options.data,
                slo=options.slo,
            )
        )
    except (ValueError, OSError) as error:
        return fail(options, error)


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text.split(",")))


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--policies",
        type=policy_names,
        default=get_args(PolicyName),
        metavar="A,B,…",
        help="names, or module:Class of your own; ratios are to fcfs; default: all that come along",
    )
    parser.add_argument(
        "--workloads",
        type=_names,
        default=(),
        metavar="A,B,…",
        help="of the standing set (docs/simulation.md lists it); default: all",
    )
    parser.add_argument(
        "--loads",
        type=positive_list(float),
        default=(),
        metavar="X,Y,…",
        help="over the rate at which fcfs is saturated; default: 0.7,0.9,0.95,1.2,2",
    )
    parser.add_argument(
        "--seeds", type=positive(int), metavar="N", help="runs of each case; default: 5"
    )
    parser.add_argument(
        "--quick", action="store_true", help="few requests, one seed, loads of 0.7, 0.95 and 2"
    )
    parser.add_argument(
        "--jobs",
        type=positive(int),
        default=os.cpu_count() or 1,
        metavar="N",
        help="simulations side by side; default: one for each core",
    )
    add_slo(parser)
    data = parser.add_argument(
        "--data", type=Path, metavar="DIRECTORY", help="of length files of your own"
    )
    json = parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="keep every run here, one JSON object a line; with a file from before, only what it "
        "lacks is run",
    )
    complete_with(data, DIRECTORY)
    complete_with(json, FILE)


COMMAND = Command(
    name="compare-policies",
    summary="all policies on a standing set of workloads",
    description="Simulates scheduling policies on a standing set of workloads, at loads below and "
    "beyond saturation: throughput, goodput, gaps between tokens, and where each falls short of "
    "fcfs. To judge a policy of your own, or a change of one; docs/simulation.md.",
    examples=(
        "--quick --policies fcfs,skip_join_mlfq",
        "--policies fcfs,my_module:MyPolicy --workloads sharegpt,long-prompts --json runs.jsonl",
    ),
    run=_compare,
    extra="simulator",
    add_arguments=_add_arguments,
    config="none",
)
