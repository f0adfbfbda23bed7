"""Lose each process of a deployment under load."""

from __future__ import annotations

import argparse
import importlib.util

from fastserve_mega.commands.command import Command, fail, load_deployment, pass_on
from fastserve_mega.commands.options import add_runner


def _drill(options: argparse.Namespace) -> int:
    if importlib.util.find_spec("httpx") is None:
        return fail(options, "needs httpx: pip install 'fastserve_mega[terminal]'")
    config = load_deployment(options, weights=options.runner == "megatron")
    from fastserve_mega.drill.drill import DrillOptions, run_drill

    return run_drill(
        config,
        pass_on(options),
        DrillOptions(
            rounds=options.rounds,
            streams=options.streams,
            tokens=options.tokens,
            only=tuple(options.only),
            runner=options.runner,
        ),
    )


def _add_drill(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=1, help="for each process and signal")
    parser.add_argument("--streams", type=int, default=8, help="half over HTTP, half over ZeroMQ")
    parser.add_argument("--tokens", type=int, default=150, help="of each answer")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PROCESS",
        help="'rank 0', coordinator, mpirun or api-server; may be given several times",
    )
    add_runner(parser)


COMMAND = Command(
    name="drill",
    summary="kill and stop each process under load, count what is lost",
    description="Serves the configuration at free ports of this machine, keeps streams running "
    "over HTTP and ZeroMQ, and sends SIGKILL and SIGSTOP to each process in turn. Prints how many "
    "streams were lost, how many had other tokens than without a signal, how long they waited, and "
    "what was left behind.",
    examples=(
        "--config configs/smollm2-135m-cpu.yaml",
        "--config configs/smollm2-135m-cpu.yaml --rounds 20 --streams 32 --only coordinator",
    ),
    run=_drill,
    add_arguments=_add_drill,
)
