#!/usr/bin/env python3
"""Streams for a long time, with a process lost now and then: what grows, and what fails.

    python -m tests.system.soak --config configs/smollm2-135m-cpu.yaml --minutes 60

Prints a line a minute: streams so far, lost ones and ones with other tokens, restarts, and of each
process its resident memory in MB and its open files. Exit status 1 when a stream was lost or wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from pathlib import Path

from fastserve_mega.drill.drill import serving
from fastserve_mega.drill.processes import named_processes, victims
from fastserve_mega.drill.rounds import Drill, Served, Tally
from fastserve_mega.system.config_file import load_config

from .asked import Figure, tell

PAGE_BYTES = 4096
SERVE = "serve"


def sizes(served: Served) -> str:
    """Memory and files of all processes."""
    told = []
    for name, number in {SERVE: served.process_id, **named_processes(served.process_id)}.items():
        process = Path(f"/proc/{number}")
        try:
            pages = int((process / "statm").read_text().split()[1])
            files = len(list((process / "fd").iterdir()))
        except OSError:
            continue
        told.append(f"{name} {pages * PAGE_BYTES / 1e6:.1f}/{files}")
    return ", ".join(told)


async def soak(served: Served, num_ranks: int, options: argparse.Namespace) -> bool:
    drill = Drill(served, options.streams, options.tokens)
    await drill.undisturbed()
    choices, numbers = victims(num_ranks), random.Random(options.seed)
    total = Tally(choices[0])
    begin = told = time.monotonic()
    restarts = 0
    while (now := time.monotonic()) < begin + 60 * options.minutes:
        if restarts < (now - begin) / 60 * options.kills:
            restarts += 1
            await drill.round(numbers.choice(choices), total)
        else:
            await drill.calm(total)
        if time.monotonic() - told > 60:
            told = time.monotonic()
            print(
                f"{(told - begin) / 60:.0f} min: {total.streams} streams, {total.lost} lost, "
                f"{total.wrong} wrong, {restarts} restarts; {sizes(served)}",
                flush=True,
            )
    print(f"{total.streams} streams, {restarts} restarts; {sizes(served)}")
    return tell([Figure("lost streams", total.lost, 0), Figure("wrong ones", total.wrong, 0)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--kills", type=float, default=1, help="processes lost in a minute")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--runner", choices=("megatron", "fake"), default="megatron")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    config = load_config(options.config)
    with serving(config, ["--config", options.config], options.runner) as served:
        return 0 if asyncio.run(soak(served, config.parallel.world_size, options)) else 1


if __name__ == "__main__":
    sys.exit(main())
