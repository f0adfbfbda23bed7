"""What a batch costs those who wait, live, and counted in steps: a busy machine changes nothing.

    python -m tests.system.beside_a_batch --rate 6 --set scheduler.policy=paced

Serves with ranks that compute nothing and take 20 ms a step, sends the same requests alone and
then beside `fastserve-mega batch`, and counts in the log of the scheduler how many steps each one's
first token took. Exit status 1 when the P95 beside the batch is more than a tenth higher, or the
batch stands still.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastserve_mega.coordinator.event_log import read_event_log
from fastserve_mega.drill.drill import serving
from fastserve_mega.scheduling.events import Arrived, StepDone
from fastserve_mega.simulator.report import distribution
from fastserve_mega.system.config_file import load_config
from fastserve_mega.types import BACKGROUND_PRIORITY

CONFIG = Path(__file__).parents[2] / "configs" / "smollm2-135m-cpu.yaml"
MOST = 1.1
LIMIT_S = 600.0
FIRST_TOKENS = 2_000
"""Ids of tokens below may have a meaning."""


def steps_to_first_token(log: Path) -> Iterator[tuple[bool, int]]:
    """Of each request, whether it is of the batch, and the steps until its first token."""
    ended = 0
    arrived: dict[str, tuple[int, bool]] = {}
    sampling: dict[int, list[str]] = {}
    for call in read_event_log(log)[1]:
        for event in call.events:
            if isinstance(event, Arrived):
                is_of_batch = event.priority == BACKGROUND_PRIORITY
                arrived[event.request_id] = ended, is_of_batch
            elif isinstance(event, StepDone):
                ended += 1
                for request_id in sampling.pop(event.step_id, ()):
                    if request_id in arrived:
                        since, is_of_batch = arrived.pop(request_id)
                        yield is_of_batch, ended - since
        if call.plan is not None:
            sampling[call.plan.step_id] = [
                each.request_id for each in call.plan.batch if each.samples
            ]


def write_batch(path: Path, count: int) -> None:
    """Prompts of 60 to 250 tokens, 32 tokens to answer."""
    draw = random.Random(3)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            prompt = [draw.randrange(FIRST_TOKENS, 40_000) for _ in range(draw.randint(60, 250))]
            body = {"prompt": prompt, "max_tokens": 32, "ignore_eos": True}
            line = {"custom_id": str(number), "url": "/v1/completions", "body": body}
            file.write(f"{json.dumps(line)}\n")


def measure(directory: Path, overrides: Sequence[str], rate: float, count: int) -> Path:
    """Serve, send, send beside a batch; the log of it all."""
    log = directory / "log.jsonl"
    sets = [*overrides, "parallel.pipeline=1", f"coordinator.event_log={log}"]
    arguments = ["--config", str(CONFIG), *(word for each in sets for word in ("--set", each))]
    write_batch(directory / "in.jsonl", 100_000)
    ours = [sys.executable, "-m", "fastserve_mega"]
    with serving(load_config(CONFIG, sets), arguments, "fake") as served:
        asked = [
            *ours, "bench", "--url", served.url, "--rate", str(rate), "--requests", str(count),
            "--mix", "0.8:64/16,0.2:256/64", "--seed", "11",
        ]  # fmt: skip
        subprocess.run(asked, check=True, timeout=LIMIT_S, stdout=subprocess.DEVNULL)
        files = [str(directory / name) for name in ("in.jsonl", "out.jsonl")]
        with subprocess.Popen([*ours, "batch", *files, "--url", served.url]) as batch:
            try:
                while not (directory / "out.jsonl").exists():
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        batch.wait(0.1)
                subprocess.run(asked, check=True, timeout=LIMIT_S, stdout=subprocess.DEVNULL)
            finally:
                batch.kill()
    return log


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=6.0)
    parser.add_argument("--requests", type=int, default=150)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        log = measure(Path(directory), options.overrides, options.rate, options.requests)
        rows = list(steps_to_first_token(log))
    waited_for = [steps for is_of_batch, steps in rows if not is_of_batch]
    alone, beside = waited_for[: options.requests], waited_for[-options.requests :]
    answered = len(rows) - len(waited_for)
    for name, steps in (("alone", alone), ("beside a batch", beside)):
        told = distribution(steps)
        print(f"{name}, steps to the first token: mean {told.mean:.2f}, P95 {told.p95:g}")
    print(f"{answered} requests of the batch began meanwhile")
    return int(distribution(beside).p95 > MOST * distribution(alone).p95 or not answered)


if __name__ == "__main__":
    sys.exit(main())
