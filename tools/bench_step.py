"""Times steps of one rank in this process, the native engine and torch's in turns.

Each round has every engine run every case; the best of all rounds counts, since other processes
only ever add time. With `--beside` it tells instead how much of its speed the native engine keeps
beside processes that never wait.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from fastserve_mega.system.config import Config, KvCacheConfig, ModelConfig, ParallelConfig
from fastserve_mega.types import RequestId, SamplingParams
from fastserve_mega.worker.megatron.megatron_runner import MegatronRunner
from fastserve_mega.worker.model_runner import SequenceInput
from fastserve_mega.worker.topology import Topology

BLOCK_SIZE = 16
CONTEXT = 165
ENGINES = ("torch", "native")


def sequences(count: int, start: int, tokens: int) -> list[SequenceInput]:
    """Requests with `tokens` new tokens each after `start`, in blocks of their own."""
    blocks = -(-(start + tokens) // BLOCK_SIZE)
    return [
        SequenceInput(
            request_id=RequestId(str(index)),
            token_ids=[1000 + index + token for token in range(tokens)],
            start=start,
            block_table=range(1 + index * blocks, 1 + (index + 1) * blocks),
            samples=True,
            params=SamplingParams(max_tokens=1, temperature=0.0),
            seed=0,
            prompt_tokens=start + tokens,
        )
        for index in range(count)
    ]


CASES = {
    f"decode, batch 1, context {CONTEXT}": sequences(1, CONTEXT - 1, 1),
    f"decode, batch 16, context {CONTEXT}": sequences(16, CONTEXT - 1, 1),
    "prefill of 512 tokens": sequences(1, 0, 512),
}


def seconds(runner: MegatronRunner, batch: Sequence[SequenceInput], times: int) -> float:
    """The best of some steps."""
    best = float("inf")
    for _ in range(times):
        began = time.perf_counter()
        runner.execute(batch)
        best = min(best, time.perf_counter() - began)
    return best


def open_runner(engine: str, arguments: argparse.Namespace) -> MegatronRunner:
    """One rank with the whole model."""
    config = Config(
        model=ModelConfig(
            path=str(arguments.model), dtype=arguments.dtype, quantization=arguments.quantization
        ),
        parallel=ParallelConfig(
            device="cpu", threads_per_rank=arguments.threads, cpu_engine=engine
        ),
        kv_cache=KvCacheConfig(block_size=BLOCK_SIZE, device_blocks=400),
    )
    return MegatronRunner(config, Topology(), "", 0)


def measure(arguments: argparse.Namespace) -> dict[tuple[str, str], float]:
    """Best time of each case and engine. One engine is open at a time, as in a server."""
    best: dict[tuple[str, str], float] = {}
    for _ in range(arguments.rounds):
        for engine in arguments.engines:
            runner = open_runner(engine, arguments)
            for case, batch in CASES.items():
                seconds(runner, batch, 3)
                took = seconds(runner, batch, arguments.steps)
                best[case, engine] = min(took, best.get((case, engine), took))
            runner.close()
    return best


@contextmanager
def spinning(count: int) -> Iterator[None]:
    """So many processes that never wait."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def rate(runner: MegatronRunner, batch: Sequence[SequenceInput], times: int) -> float:
    """Steps per second, all of them counted."""
    began = time.perf_counter()
    for _ in range(times):
        runner.execute(batch)
    return times / (time.perf_counter() - began)


def tell_beside(arguments: argparse.Namespace) -> None:
    """Print each case's steps per second beside others, as a share of those alone."""
    runner = open_runner("native", arguments)
    for case, batch in CASES.items():
        rates: dict[int, list[float]] = {count: [] for count in (0, *arguments.beside)}
        seconds(runner, batch, 3)
        for _ in range(arguments.rounds):
            for count, found in rates.items():
                with spinning(count):
                    found.append(rate(runner, batch, arguments.steps))
        for count in arguments.beside:
            share = median(rates[count]) / median(rates[0])
            print(f"{case}, beside {count}: {share:.2f} of alone")
    runner.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument(
        "--quantization", default="none", choices=("none", "int8"), help="not of torch"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="of each case and round")
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument("--beside", nargs="+", type=int, metavar="PROCESSES")
    parser.add_argument("--json", action="store_true", help="seconds of each case and engine")
    arguments = parser.parse_args()
    if arguments.beside:
        tell_beside(arguments)
        return
    best = measure(arguments)
    if arguments.json:
        print(json.dumps({f"{case}, {engine}": took for (case, engine), took in best.items()}))
        return
    if len(arguments.engines) == 1:
        for case in CASES:
            print(f"{case}: {best[case, arguments.engines[0]] * 1e3:.1f} ms")
        return
    print("| step | torch, ms | native, ms | times as fast |\n|---|---|---|---|")
    for case in CASES:
        torch_s, native_s = (best[case, engine] for engine in ENGINES)
        print(f"| {case} | {torch_s * 1e3:.1f} | {native_s * 1e3:.1f} | {torch_s / native_s:.2f} |")


if __name__ == "__main__":
    main()
