"""A deployment plan as text and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from fastserve_mega.printing import FittedTable, print_sentence
from fastserve_mega.system.config import Config
from fastserve_mega.system.deployment import (
    CONTEXT_BYTES,
    DeploymentPlan,
    StagePlan,
    plan_deployment,
)
from fastserve_mega.system.hardware import GIB
from fastserve_mega.system.locate import find_architecture

_LENGTHS = (512, 2048)
"""Tokens of prompt and answer for which the report says how many requests fit."""


def run_plan(config: Config, config_file: Path, *, as_json: bool) -> int:
    """`fastserve-mega plan`: print it; returns the exit status, 1 when something does not fit.

    Raises:
        ValueError: the model is not found, or cannot be split over this mesh.
    """
    architecture, directory = find_architecture(config, config_file)
    plan = plan_deployment(config, architecture)
    console = Console()
    if as_json:
        console.print_json(json.dumps(plan_as_json(plan)))
    else:
        print_plan(plan, config, directory, console)
    return 1 if plan.problems else 0


def print_plan(plan: DeploymentPlan, config: Config, directory: Path, console: Console) -> None:
    """The whole report."""
    print_sentence(
        console,
        f"[bold]{plan.model}[/bold] ({plan.architecture.name}, from {directory}): "
        f"{plan.parameters / 1e9:.2f} billion parameters of {plan.value_bytes} bytes, "
        f"{plan.weight_bytes / 1e9:.1f} GB of weights on all ranks together",
    )
    parallel = config.parallel
    print_sentence(
        console,
        f"{parallel.world_size} rank{'s' if parallel.world_size > 1 else ''} on {plan.nodes} "
        f"node{'s' if plan.nodes > 1 else ''}: {plan.replicas} "
        f"replica{'s' if plan.replicas > 1 else ''} x {parallel.pipeline} pipeline x "
        f"{parallel.tensor} tensor",
    )
    console.print(_stage_table(plan))
    print_sentence(
        console,
        f"Beside the weights each rank needs about {plan.activation_bytes / GIB:.2f} GiB for the "
        f"activations of a step (scheduler.max_batch_tokens={config.scheduler.max_batch_tokens}) "
        f"and, with CUDA, {CONTEXT_BYTES / GIB:.1f} GiB for its context.",
    )
    print_sentence(
        console,
        f"KV: {plan.kv_bytes_per_token / 1e6:.3f} MB per token on all ranks of a replica "
        f"together, {plan.block_size} tokens in a block.",
    )
    console.print(_request_table(plan))
    for problem in plan.problems:
        print_sentence(console, f"[red]does not fit:[/red] {escape(problem)}")


def plan_as_json(plan: DeploymentPlan) -> dict[str, object]:
    """The figures of the report; sizes in bytes."""
    return {
        "model": plan.model,
        "architecture": plan.architecture.name,
        "parameters": plan.parameters,
        "weight_bytes": plan.weight_bytes,
        "kv_bytes_per_token": plan.kv_bytes_per_token,
        "activation_bytes": plan.activation_bytes,
        "context_bytes": CONTEXT_BYTES,
        "replicas": plan.replicas,
        "nodes": plan.nodes,
        "device_blocks": plan.device_blocks,
        "host_blocks": plan.host_blocks,
        "stages": [_stage_as_json(stage) for stage in plan.stages],
        "problems": list(plan.problems),
    }


def _stage_as_json(stage: StagePlan) -> dict[str, object]:
    return {
        "stage": stage.stage,
        "ranks": [list(ranks) for ranks in stage.ranks],
        "layers": [stage.layers.start, stage.layers.stop],
        "query_heads": stage.query_heads,
        "kv_heads": stage.kv_heads,
        "parameters": stage.parameters,
        "weight_bytes": stage.weight_bytes,
        "kv_bytes_per_token": stage.kv_bytes_per_token,
        "device_blocks": stage.device_blocks,
        "host_blocks": stage.host_blocks,
    }


def _stage_table(plan: DeploymentPlan) -> FittedTable:
    table = FittedTable(
        "stage", "ranks", "layers", "query heads", "KV heads", "weights, GiB", "KV per token, KiB",
        "device blocks", "host blocks", title="what each rank holds", text_columns=3,
    )  # fmt: skip
    for stage in plan.stages:
        table.add_row(
            str(stage.stage),
            ", ".join(_span(ranks) for ranks in stage.ranks),
            _span(stage.layers),
            str(stage.query_heads),
            str(stage.kv_heads),
            f"{stage.weight_bytes / GIB:.2f}",
            f"{stage.kv_bytes_per_token / 1024:.1f}",
            "unknown" if stage.device_blocks is None else f"{stage.device_blocks:,}",
            f"{stage.host_blocks:,}",
        )
    return table


def _request_table(plan: DeploymentPlan) -> FittedTable:
    lengths = sorted({*(each for each in _LENGTHS if each < plan.max_context), plan.max_context})
    table = FittedTable(
        "memory", "blocks", "tokens", *(f"requests of {length:,} tokens" for length in lengths),
        title="KV of a replica: the smallest pool of its ranks", text_columns=2,
    )  # fmt: skip
    for name, blocks in (("device", plan.device_blocks), ("host", plan.host_blocks)):
        if blocks is None:
            table.add_row(name, "unknown: give hardware.device, or parallel.device=cpu")
            continue
        counts = [f"{plan.requests_of(length, blocks):,}" for length in lengths]
        tokens = max(blocks - 1, 0) * plan.block_size
        table.add_row(name, f"{blocks:,}", f"{tokens:,}", *counts)
    return table


def _span(numbers: range) -> str:
    if len(numbers) == 1:
        return str(numbers.start)
    return f"{numbers.start}-{numbers.stop - 1}"
