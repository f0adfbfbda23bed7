"""What `fastserve-mega drill` does: serve a deployment, lose each process in turn, and report."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from fastserve_mega import faults
from fastserve_mega.drill.processes import Victim, victims
from fastserve_mega.drill.rounds import Drill, Served, Tally
from fastserve_mega.launcher.processes import free_port
from fastserve_mega.process_tree import descendants, die_with_parent, is_running
from fastserve_mega.system.config import Config
from fastserve_mega.system.key_file import client_address

_HEADINGS = (
    "process", "signal", "rounds", "streams", "lost", "wrong tokens",
    "next token: median s", "max s", "orphans", "ports left", "memory left",
)  # fmt: skip
_READY = b"Ctrl-C ends it"
_FAKE_STEP = "rank.before_step:delay=0.02"
"""Ranks that compute nothing would be done before anything is killed."""
_OFTEN = 1_000_000
_STOP_S = 60.0


@dataclass(frozen=True, slots=True)
class DrillOptions:
    """How much of a drill."""

    rounds: int
    """For each process and signal."""
    streams: int
    tokens: int
    only: tuple[str, ...] = ()
    """Names of processes; none stands for all."""
    runner: Literal["megatron", "fake"] = "megatron"


def run_drill(config: Config, arguments: Sequence[str], options: DrillOptions) -> int:
    """Serve the configuration at free ports, and lose each of its processes; print a table.

    Returns:
        0 when nothing was lost, wrong or left.
    """
    chosen = [
        victim
        for victim in victims(config.parallel.world_size)
        if not options.only or victim.name in options.only
    ]
    if not chosen:
        names = sorted({victim.name for victim in victims(config.parallel.world_size)})
        print(f"there is no process of these names; there are {', '.join(names)}", file=sys.stderr)
        return 2
    with serving(config, arguments, options.runner) as served:
        everyone = descendants(served.process_id)
        try:
            is_clean = asyncio.run(drill(served, chosen, options))
            everyone |= descendants(served.process_id)
        except RuntimeError as error:
            print(f"fastserve-mega drill: {error}", file=sys.stderr)
            return 1
    left = sum(map(is_running, everyone))
    print(f"\nafter its end, {left} processes of it are left")
    return 0 if is_clean and not left else 1


async def drill(served: Served, chosen: Sequence[Victim], options: DrillOptions) -> bool:
    """Run all rounds and print a row for each victim; whether nothing was lost, wrong or left."""
    drill = Drill(served, options.streams, options.tokens)
    await drill.undisturbed()
    print(f"| {' | '.join(_HEADINGS)} |\n|{'---|' * len(_HEADINGS)}", flush=True)
    is_clean = True
    for victim in chosen:
        tally = Tally(victim)
        for _ in range(options.rounds):
            await drill.round(victim, tally)
        print(f"| {' | '.join(tally.row)} |", flush=True)
        is_clean &= tally.is_clean
    return is_clean


@contextlib.contextmanager
def serving(config: Config, arguments: Sequence[str], runner: str) -> Iterator[Served]:
    """Run `serve` at free ports until the context is left.

    Args:
        config: of the deployment.
        arguments: that give a child the same configuration.
        runner: of the ranks.
    """
    key = client_address(config.coordinator).removeprefix(config.coordinator.client_endpoint)
    endpoint, port = f"tcp://127.0.0.1:{free_port()}", free_port()
    sets = [
        f"coordinator.client_endpoint={endpoint}",
        "server.host=127.0.0.1",
        f"server.port={port}",
        f"supervisor.max_restarts={_OFTEN}",
    ]
    command = [sys.executable, "-m", "fastserve_mega", "serve", *arguments, "--runner", runner]
    command += [word for value in sets for word in ("--set", value)]
    environment = dict(os.environ)
    if runner == "fake":
        environment.setdefault(faults.VARIABLE, _FAKE_STEP)
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        env=environment,
        preexec_fn=die_with_parent,  # noqa: PLW1509 - one system call, no lock
    ) as server:
        try:
            assert server.stdout is not None
            while _READY not in (line := server.stdout.readline()):
                if not line:
                    raise SystemExit(1)  # it has said why
            yield Served(server.pid, f"http://127.0.0.1:{port}", f"{endpoint}{key}")
        finally:
            server.terminate()
            try:
                server.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                server.kill()
