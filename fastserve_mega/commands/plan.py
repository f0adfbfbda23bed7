"""Compute what goes where before there is a GPU."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastserve_mega.commands.command import Command, fail, load
from fastserve_mega.system.config_file import load_config


def _plan(options: argparse.Namespace) -> int:
    config = load(options, load_config)
    from fastserve_mega.commands.plan_report import run_plan

    try:
        return run_plan(config, Path(options.config or ""), as_json=options.json)
    except (ValueError, OSError) as error:
        return fail(options, error)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="all figures, sizes in bytes")


COMMAND = Command(
    name="plan",
    summary="compute what goes on which rank, and whether it fits",
    description="Computes layers, heads, weights and KV blocks of each rank from the "
    "configuration and the model's config.json, without a GPU or weights. Ends with "
    "status 1 and says why when something does not fit.",
    examples=(
        "Qwen/Qwen2.5-7B-Instruct --tensor 2",
        "--config configs/llama-3-70b-4xh100.yaml",
        "--config configs/llama-3-70b-4xh100.yaml --set hardware.device_memory_gb=40 --json",
    ),
    run=_plan,
    config="model",
    add_arguments=_add_plan,
)
