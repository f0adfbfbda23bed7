"""Run the scheduler on a virtual clock."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fastserve_mega.commands.command import (
    DIRECTORY,
    FILE,
    Command,
    complete_with,
    fail,
    load,
)
from fastserve_mega.commands.options import add_slo, policy_names, positive_list
from fastserve_mega.system.config_file import load_config


def _simulate(options: argparse.Namespace) -> int:
    from fastserve_mega.coordinator.profile_file import load_profile
    from fastserve_mega.simulator.config import (
        SimulationConfig,
        load_simulation_config,
        split_overrides,
    )
    from fastserve_mega.simulator.main import run_simulate

    def read(path: str | None, overrides: Sequence[str]) -> SimulationConfig:
        assert path is not None  # argparse has asked for it
        deployment, _ = split_overrides(overrides)
        measured = options.profile or load_config(path, deployment).scheduler.profile
        profile = load_profile(measured) if measured else None
        return load_simulation_config(path, options.workload, overrides, profile=profile)

    config = load(options, read)
    try:
        return run_simulate(
            config,
            data=options.data,
            policies=options.policies,
            rates=options.rates,
            json_path=options.json,
            plots=options.plots,
            slo=options.slo,
        )
    except (ValueError, OSError) as error:
        return fail(options, error)


def _add_simulate(parser: argparse.ArgumentParser) -> None:
    workload = parser.add_argument(
        "--workload",
        type=Path,
        metavar="YAML",
        help="which requests, and when, as in configs/workloads; --set workload.field=value "
        "overrides it; default: lengths like ShareGPT's, which need --rates",
    )
    profile = parser.add_argument(
        "--profile",
        type=Path,
        metavar="FILE",
        help="step times that `fastserve-mega profile` measured, in place of those of "
        "hardware.device; default: scheduler.profile",
    )
    data = parser.add_argument(
        "--data",
        type=Path,
        metavar="DIRECTORY",
        help="of length files of your own; taken before those that are shipped",
    )
    parser.add_argument(
        "--policies",
        type=policy_names,
        default=(),
        metavar="A,B,…",
        help="policies to compare; default: the configured one",
    )
    parser.add_argument(
        "--rates",
        type=positive_list(float),
        default=(),
        metavar="X,Y,…",
        help="requests per second; default: the configured rate",
    )
    add_slo(parser)
    json = parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    plots = parser.add_argument("--plots", type=Path, metavar="DIRECTORY", help="write plots")
    complete_with(data, DIRECTORY)
    complete_with(plots, DIRECTORY)
    complete_with(json, FILE)
    complete_with(workload, FILE)
    complete_with(profile, FILE)


COMMAND = Command(
    name="simulate",
    summary="run the scheduler on a virtual clock",
    description="Runs a deployment's own scheduler, pools and mesh on a virtual clock, "
    "with step times from data sheets (hardware.device) or from `profile`. Compares "
    "policies and rates in seconds, without a GPU or weights; docs/simulation.md.",
    examples=(
        "--config configs/opt-13b-a100.yaml --workload configs/workloads/sharegpt.yaml",
        "--config configs/opt-13b-a100.yaml --rates 2,4 "
        "--policies fcfs,skip_join_mlfq --json result.json",
        "--config configs/smollm2-135m-cpu.yaml --profile profile.json --rates 0.5",
    ),
    run=_simulate,
    extra="simulator",
    add_arguments=_add_simulate,
)
