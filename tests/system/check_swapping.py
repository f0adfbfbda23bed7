"""Swap on purpose, and compare every token with an undisturbed run of the same engine.

    python -m tests.system.check_swapping --pipeline 1 2 --prefix-cache on off

For each number of pipeline stages one run with plenty of memory and no prefix cache, then one per
strategy, with and without prefix cache, with so few device blocks that requests are preempted again
and again. Exit status 1 when a token differs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastserve_mega.client import AsyncClient
from fastserve_mega.coordinator.event_log import read_event_log
from fastserve_mega.launcher import Deployment
from fastserve_mega.plan import Plan
from fastserve_mega.system.config_file import load_config
from fastserve_mega.text.tokenizer import Tokenizer
from fastserve_mega.types import FinishReason, RequestId, SamplingParams

CONFIG = str(Path(__file__).parents[2] / "configs" / "smollm2-135m-cpu.yaml")
PROMPTS = Path(__file__).parents[1] / "data" / "mtbench_prompts.jsonl"
STRATEGIES = ("proactive", "reactive", "recompute", "none")
Outputs = list[tuple[int, ...]]
Prompts = Sequence[Sequence[int]]
# Few at a time, and quanta soon used up, so that many are preempted. A shorter limit would promote
# all of them for ever, and recompute would then prefill for each token.
PREEMPTING = (
    "scheduler.policy=skip_join_mlfq", "scheduler.max_batch_size=8",
    "scheduler.mlfq.base_quantum_s=0.03", "scheduler.mlfq.quantum_ratio=1.5",
    "scheduler.mlfq.levels=20", "scheduler.mlfq.starvation_limit_s=6.0",
    "scheduler.admission=greedy",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """How a deployment is to be started."""

    strategy: str
    pipeline: int
    device_blocks: int
    prefix_cache: bool = True


@dataclass(frozen=True)
class Returns:
    """How often one request ran again after it had lost its device blocks.

    A request that is preempted, comes back and is preempted again before it runs counts once, so
    these are lower bounds.
    """

    with_kv: int = 0
    """It went on where it had stopped."""
    recomputed: int = 0
    """Part of its KV was computed again."""


@dataclass(frozen=True)
class Run:
    """What a deployment did, and what it cost."""

    case: Case
    requests: int
    run_s: float
    preemptions: int
    swap_ins: int
    blocks_out: int
    blocks_in: int
    recomputed_tokens: int
    prefix_hit_tokens: int
    copy_s: float
    step_wait_s: float
    idle_wait_s: float
    returns: tuple[Returns, ...] = ()
    """How often each request returned."""


def read_prompts(path: Path, model: Path, count: int) -> list[list[int]]:
    """Chat prompts spread evenly over a file of {"turns": [text, …]} lines, as token ids."""
    tokenizer = Tokenizer(model)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = rows[:: max(len(rows) // count, 1)][:count]
    return [
        tokenizer.apply_chat_template([{"role": "user", "content": row["turns"][0]}])
        for row in rows
    ]


def settings_of(case: Case) -> list[str]:
    """What the configuration of a deployment differs by."""
    return [
        "model.dtype=float32",
        f"parallel.pipeline={case.pipeline}",
        f"kv_cache.device_blocks={case.device_blocks}",
        f"kv_cache.swap.strategy={case.strategy}",
        f"kv_cache.prefix_cache={str(case.prefix_cache).lower()}",
        *PREEMPTING,
    ]


def run_engine(
    case: Case, prompts: Prompts, tokens: int, overrides: Sequence[str]
) -> tuple[Outputs, Run]:
    """Start a deployment, send all prompts at once, and take metrics and event log at the end."""
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "events.jsonl"
        endpoint = f"tcp://127.0.0.1:{_free_port()}"
        mine = (f"coordinator.client_endpoint={endpoint}", f"coordinator.event_log={log}")
        sets = [*mine, *settings_of(case), *overrides]
        arguments = ["--config", CONFIG, *(word for value in sets for word in ("--set", value))]
        with Deployment(load_config(CONFIG, sets), arguments, http=False) as deployment:
            deployment.start()
            outputs, run = asyncio.run(generate(endpoint, case, prompts, tokens))
        _, calls = read_event_log(log)
        returns = count_returns(call.plan for call in calls if call.plan)
        return outputs, replace(run, returns=tuple(returns.values()))


def count_returns(plans: Iterable[Plan]) -> dict[RequestId, Returns]:
    """What the plans of a run say about each request that ran."""
    returns: dict[RequestId, Returns] = {}
    computed: dict[RequestId, int] = {}
    for piece in (piece for plan in plans for piece in plan.batch):
        request_id = piece.request_id
        is_new_table = piece.block_start == 0 and piece.block_ids
        so_far = returns.setdefault(request_id, Returns())
        if is_new_table and request_id in computed:
            if piece.start == computed[request_id]:
                so_far = replace(so_far, with_kv=so_far.with_kv + 1)
            else:
                so_far = replace(so_far, recomputed=so_far.recomputed + 1)
        returns[request_id] = so_far
        computed[request_id] = piece.start + piece.num_tokens
    return returns


async def generate(endpoint: str, case: Case, prompts: Prompts, tokens: int) -> tuple[Outputs, Run]:
    """Send all prompts at once to a server, and take its metrics at the end."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    async with AsyncClient(endpoint) as client:
        begin = time.monotonic()
        answers = [await client.submit(prompt, params) for prompt in prompts]
        for answer in answers:
            await answer.wait()
            if answer.finish_reason is not FinishReason.LENGTH:
                raise RuntimeError(f"a request ended with {answer.finish_reason} after "
                                   f"{len(answer.token_ids)} tokens")  # fmt: skip
        outputs = [answer.token_ids for answer in answers]
        run_s = time.monotonic() - begin
        text = await client.metrics()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))

    def value(name: str) -> float:
        return float(values[f"fastserve_{name}"])

    return outputs, Run(
        case=case,
        requests=len(prompts),
        run_s=run_s,
        preemptions=int(value("preemptions_total")),
        swap_ins=int(value('copy_seconds_count{direction="in"}')),
        blocks_out=int(value('swap_blocks_total{direction="out"}')),
        blocks_in=int(value('swap_blocks_total{direction="in"}')),
        recomputed_tokens=int(value("recomputed_tokens_total")),
        prefix_hit_tokens=int(value("prefix_cache_hit_tokens_total")),
        copy_s=sum(value(f'copy_seconds_sum{{direction="{way}"}}') for way in ("in", "out")),
        step_wait_s=value('copy_wait_seconds_total{kind="step"}'),
        idle_wait_s=value('copy_wait_seconds_total{kind="idle"}'),
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def render(rows: Sequence[tuple[Run, int]]) -> Table:
    """Runs, each with the number of its answers that equal the undisturbed ones."""
    table = Table(title=f"{rows[0][0].requests} requests; least / mean of a request")
    for name in ("stages", "strategy", "prefix cache", "device blocks", "run s", "preemptions",
                 "returns with KV", "returns recomputed", "blocks out/in", "recomputed tokens",
                 "prefix hit tokens", "copying s", "step wait", "idle wait",
                 "equal"):  # fmt: skip
        table.add_column(name, justify="left" if name == "strategy" else "right")
    for run, equal in rows:
        case = run.case
        table.add_row(
            str(case.pipeline), case.strategy, "on" if case.prefix_cache else "off",
            str(case.device_blocks), f"{run.run_s:.0f}", str(run.preemptions),
            least_and_mean([each.with_kv for each in run.returns]),
            least_and_mean([each.recomputed for each in run.returns]),
            f"{run.blocks_out}/{run.blocks_in}", str(run.recomputed_tokens),
            str(run.prefix_hit_tokens), f"{run.copy_s:.2f}",
            f"{run.step_wait_s / run.run_s:.2%}", f"{run.idle_wait_s / run.run_s:.2%}",
            f"{equal} of {run.requests}",
        )  # fmt: skip
    return table


def least_and_mean(counts: Sequence[int]) -> str:
    """Two figures for a cell."""
    return f"{min(counts)} / {sum(counts) / len(counts):.1f}" if counts else "-"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="JSON lines with `turns`")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--device-blocks", type=int, default=96)
    parser.add_argument("--pipeline", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--prefix-cache", nargs="+", choices=("on", "off"), default=["on"])
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    model = load_config(CONFIG, options.set).model.directory
    prompts = read_prompts(options.prompts, model, options.requests)
    plenty = sum(-(-(len(prompt) + options.tokens) // 16) for prompt in prompts) + 1
    rows: list[tuple[Run, int]] = []
    for pipeline in options.pipeline:
        undisturbed = Case("none", pipeline, plenty, prefix_cache=False)
        expected, run = run_engine(undisturbed, prompts, options.tokens, options.set)
        rows.append((run, len(expected)))
        for strategy, cache in product(options.strategies, options.prefix_cache):
            case = Case(strategy, pipeline, options.device_blocks, cache == "on")
            outputs, run = run_engine(case, prompts, options.tokens, options.set)
            equal = sum(one == other for one, other in zip(outputs, expected, strict=True))
            rows.append((run, equal))
            Console(width=200).print(render(rows))
            if options.json:
                figures = [{**asdict(run), "equal": equal} for run, equal in rows]
                options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0 if all(equal == run.requests for run, equal in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
