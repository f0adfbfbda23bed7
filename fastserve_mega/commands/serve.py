"""Start a deployment on this machine."""

from __future__ import annotations

import argparse

from fastserve_mega.commands.command import (
    Command,
    fail,
    load_deployment,
    pass_on,
)
from fastserve_mega.commands.options import add_runner


def _serve(options: argparse.Namespace) -> int:
    config = load_deployment(options, weights=options.runner == "megatron")
    from fastserve_mega.launcher import serve
    from fastserve_mega.system.locate import has_tokenizer

    directory = config.model.directory
    if directory.is_dir() and not has_tokenizer(directory):
        # Else the HTTP server would find out when the ranks have loaded the model.
        return fail(
            options, f"{directory} has no tokenizer (tokenizer.json or another file of one)"
        )
    return serve(config, pass_on(options), runner=options.runner)


COMMAND = Command(
    name="serve",
    summary="start ranks, coordinator and HTTP server on this machine",
    description="Starts the ranks (with mpirun when there are several), the coordinator "
    "and the OpenAI-compatible HTTP server on this machine, and says how to use them. The "
    "ranks are started again when one dies; Ctrl-C ends everything.",
    examples=(
        "~/models/qwen3-8b",
        "Qwen/Qwen3-8B --tensor 2 --port 8080",
        "--config configs/smollm2-135m-cpu.yaml",
        "--config configs/smollm2-135m-cpu.yaml --set parallel.pipeline=1 --set server.port=8080",
    ),
    run=_serve,
    add_arguments=add_runner,
    config="model",
)
