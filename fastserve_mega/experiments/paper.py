"""The FastServe paper's comparison, by its own protocol, on the simulator.

    python -m fastserve_mega.experiments.paper [--quick] [--data DIRECTORY_OF_LENGTH_FILES]

The protocol is that of the authors' scripts (github.com/LLMServe/FastServe, benchmarks/
artifact-evaluation): prompt <= 1024, total <= 2048, Poisson arrivals, a finite run per rate whose
number of prompts depends on the rate, and the highest rate at which the mean of latency / output
tokens stays within 0.3 s. Beyond saturation a finite run flatters policies that let long jobs
wait; `fastserve_mega.experiments.steady_state` shows the other side.

The lengths are scaled to the paper's means (161 in, 338 out; Alpaca 19 and 58): first turns of
ShareGPT conversations have 137 and 468, Alpaca 18 and 57. Alpaca's (CC-BY-NC-4.0) are not shipped:
a stand-in with their means and variation takes their place unless --data has alpaca_lengths.csv.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

from msgspec.structs import replace
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fastserve_mega.experiments.sweep import (
    SEARCH_SPAN,
    Bound,
    Line,
    RateSearch,
    Row,
    add_columns,
    add_line,
    backlog_rate,
    print_tables,
)
from fastserve_mega.experiments.systems import load_system
from fastserve_mega.simulator.config import SimulationConfig
from fastserve_mega.simulator.report import Report
from fastserve_mega.simulator.workload import load_lengths
from fastserve_mega.slo import PAPER_SLOS
from fastserve_mega.system.config import PolicyName

DESCRIPTION = "The FastServe paper's comparison, by its own protocol, on the simulator."
LIMIT_S = 0.3
POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)
AS_IN_THE_PAPER = ("scheduler.admission=greedy",)
"""The paper starts every request at once, whether its answer will fit or not."""

# Numbers of prompts by rate, from the authors' overall_*.sh and large_bs_*.sh.
SHAREGPT_PROMPTS = ((0.1, 20), (0.2, 50), (0.5, 100), (1, 200), (1.5, 300), (1.75, 350), (2, 400))
ALPACA_PROMPTS = ((1, 100), (3, 300), (15, 300), (17, 340), (20, 400), (30, 600), (40, 800))
LARGE_BATCH_PROMPTS = ((1, 200), (2, 400), (2.5, 500), (3, 600), (3.5, 650), (4, 700))
SWAP_RATES = {
    "proactive": ("2.78", ("strategy=proactive",)),
    "proactive, nothing ahead": ("-", ("strategy=proactive", "write_through_blocks=0")),
    "reactive": ("1.72", ("strategy=reactive",)),
    "recompute": ("1.03", ("strategy=recompute",)),
    "none": ("-", ("strategy=none",)),
}
"""The paper's rate, and what to set of kv_cache.swap."""
RATIOS = (0.25, 1.0, 4.0, 16.0, 64.0, 256.0)
RATIO_TOTAL_TOKENS = 500
"""Mean of prompt and output together in the comparison over their ratio: the paper's ShareGPT."""

SLO_SYSTEMS = ("opt-13b-a100", "opt-66b-4xa100", "opt-175b-16xa100", "llama-3-8b-a100")

ROWS = (
    Row("opt-13b-a100", "ShareGPT", 2.41, 4.89),
    Row("opt-66b-4xa100", "ShareGPT", 2.03, 4.55),
    Row("opt-175b-16xa100", "ShareGPT", 2.18, 5.31),
    Row("opt-13b-a100", "Alpaca", 16.3, 32.4),
    Row("opt-66b-4xa100", "Alpaca", 10.1, 17.2),
    Row("opt-175b-16xa100", "Alpaca", 12.4, 20.1),
)


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    data: Path | None
    policies: tuple[PolicyName, ...]
    seeds: range
    tolerance: float
    overrides: tuple[str, ...]
    jobs: int


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    parser.add_argument(
        "--data", type=Path, metavar="DIR",
        help="of length files of your own; alpaca_lengths.csv is not shipped",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="one seed, coarser crossings")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument(
        "--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION",
        help=f"of {', '.join(SECTIONS)}; all by default",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="simulations side by side")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all rates here")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="SECTION.FIELD=VALUE",
        help="override one value of all configurations",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    options = Options(
        arguments.data,
        tuple(arguments.policies),
        range(1 if arguments.quick else arguments.seeds),
        0.1 if arguments.quick else 0.04,
        tuple(arguments.overrides),
        arguments.jobs,
    )
    lines: list[Line] = []
    for section in arguments.sections:
        lines += SECTIONS[section](options)
    if arguments.json:
        text = json.dumps([vars(line) for line in lines], indent=2)
        arguments.json.write_text(text + "\n", encoding="utf-8")


def paper_table(options: Options) -> list[Line]:
    """Search the six rows at mean and at P95 normalized latency <= 0.3 s/token."""
    tables = [
        Table(title=f"Maximum rate (requests/s) at {name} normalized latency <= {LIMIT_S} s/token")
        for name in ("mean", "P95")
    ]
    add_columns(tables[0], options.policies, with_paper=True)
    add_columns(tables[1], options.policies)
    lines = []
    for row in ROWS:
        config = load(row.config, options, workload=f"paper-{row.data.lower()}")
        prompts = SHAREGPT_PROMPTS if row.data == "ShareGPT" else ALPACA_PROMPTS
        found = search(f"{row.config} {row.data}", config, options, prompts)
        lines += found
        add_line(tables[0], found[0], options.policies, row)
        add_line(tables[1], found[1], options.policies)
    print_tables(*tables)
    return lines


def large_batches(options: Options) -> list[Line]:
    """Search with OPT-13B, ShareGPT, batches of 64 and 128; the paper: 1.29 and 1.17 times fcfs."""
    table = Table(title=f"OPT-13B ShareGPT, larger batches, mean <= {LIMIT_S} s/token")
    add_columns(table, options.policies)
    lines = []
    for batch in (64, 128):
        config = load("opt-13b-a100", options, f"scheduler.max_batch_size={batch}")
        (line,) = search(f"batch {batch}", config, options, LARGE_BATCH_PROMPTS, ("mean",))
        add_line(table, line, options.policies)
        lines.append(line)
    print_tables(table)
    return lines


def swap_strategies(options: Options) -> list[Line]:
    """Search with skip-join under each way to treat the KV of the preempted."""
    policies: tuple[PolicyName, ...] = ("skip_join_mlfq",)
    options = dataclasses.replace(options, policies=policies)
    table = Table(title=f"OPT-13B ShareGPT, swap strategies, mean <= {LIMIT_S} s/token")
    add_columns(table, policies)
    table.add_column("paper", justify="right")
    lines = []
    for name, (paper, settings) in SWAP_RATES.items():
        overrides = (f"kv_cache.swap.{setting}" for setting in settings)
        config = load("opt-13b-a100", options, *overrides)
        (line,) = search(name, config, options, SHAREGPT_PROMPTS, ("mean",))
        add_line(table, line, policies, more=(paper,))
        lines.append(line)
    print_tables(table)
    return lines


def length_ratios(options: Options) -> list[Line]:
    """Compare skip-join with naive MLFQ and fixed priority (the paper: up to 1.87, 13.9 times)."""
    policies: tuple[PolicyName, ...] = ("skip_join_mlfq", "mlfq", "fixed_priority")
    options = dataclasses.replace(options, policies=policies)
    table = Table(title=f"OPT-13B over input/output length ratios, mean <= {LIMIT_S} s/token")
    add_columns(table, policies, baseline="mlfq")
    table.add_column("/ fixed_priority", justify="right")
    lines = []
    for ratio in RATIOS:
        config = load("opt-13b-a100", options)
        prompt = RATIO_TOTAL_TOKENS * ratio / (1 + ratio)
        workload = replace(
            config.workload, max_prompt_tokens=None, mean_prompt_tokens=prompt,
            mean_output_tokens=RATIO_TOTAL_TOKENS - prompt,
        )  # fmt: skip
        config = replace(config, workload=workload)
        (line,) = search(f"in/out {ratio:g}", config, options, SHAREGPT_PROMPTS, ("mean",))
        to_fixed = line.mean("skip_join_mlfq") / max(line.mean("fixed_priority"), 1e-9)
        add_line(table, line, policies, baseline="mlfq", more=(f"{to_fixed:.2f}",))
        lines.append(line)
    print_tables(table)
    return lines


def slo_attainment(options: Options) -> list[Line]:
    """Search the rates at which 95 % of the requests are good (the paper: 1.5 to 2.1 times fcfs).

    By each of the SLOs of the paper's later version, whose Llama-3-8B is a row as well.
    """
    tables = [Table(title=f"Maximum rate at which 95 % are within {slo}") for slo in PAPER_SLOS]
    for table in tables:
        add_columns(table, options.policies)
    lines = []
    for system in SLO_SYSTEMS:
        prompts = SHAREGPT_PROMPTS if system.startswith("opt") else LARGE_BATCH_PROMPTS
        names = [f"missed {slo}" for slo in PAPER_SLOS]
        found = search(f"{system} ShareGPT", load(system, options), options, prompts, names)
        lines += found
        for table, line in zip(tables, found, strict=True):
            add_line(table, line, options.policies)
    print_tables(*tables)
    return lines


SECTIONS: dict[str, Callable[[Options], list[Line]]] = {
    "table": paper_table,
    "batches": large_batches,
    "swapping": swap_strategies,
    "ratios": length_ratios,
    "slo": slo_attainment,
}


def _missed(number: int, report: Report) -> float:
    return 1 - report.paper_goodputs[number]


BOUNDS = {
    "mean": Bound(lambda report: report.normalized_latency_s.mean, LIMIT_S),
    "P95": Bound(lambda report: report.normalized_latency_s.p95, LIMIT_S),
    **{f"missed {slo}": Bound(partial(_missed, i), 0.05) for i, slo in enumerate(PAPER_SLOS)},
}
"""By measure of a report."""


def load(
    name: str, options: Options, *overrides: str, workload: str = "paper-sharegpt"
) -> SimulationConfig:
    """Load a shipped system, changed by what the command line and the caller say."""
    return load_system(name, workload, (*AS_IN_THE_PAPER, *options.overrides, *overrides))


def search(
    name: str,
    config: SimulationConfig,
    options: Options,
    prompts: Sequence[tuple[float, int]],
    measures: Sequence[str] = ("mean", "P95"),
) -> list[Line]:
    """Search the maximum rates of all policies and seeds, one line per measure."""
    lengths = load_lengths(config.workload, options.data)
    if lengths.is_synthetic:
        name += " (stand-in)"
        Console(stderr=True).print(f"{name}: lengths of {lengths.origin}", soft_wrap=True)
    runs = RateSearch(config, lengths, tuple(prompts), options.tolerance)
    start = 0.8 * backlog_rate(config, lengths, num_requests=200)
    lines = [
        Line(name, measure, lengths.means, SEARCH_SPAN * start, {p: [] for p in options.policies})
        for measure in measures
    ]
    find = partial(_crossings, runs, tuple(measures), start)
    work = [(policy, seed) for policy in options.policies for seed in options.seeds]
    with (
        ProcessPoolExecutor(options.jobs) as pool,
        Progress(console=Console(stderr=True), transient=True) as progress,
    ):
        found = progress.track(pool.map(find, work), total=len(work), description=name)
        for (policy, _), rates in zip(work, found, strict=True):
            for line, rate in zip(lines, rates, strict=True):
                line.rates[policy].append(rate)
    return lines


def _crossings(
    runs: RateSearch, measures: tuple[str, ...], start: float, case: tuple[PolicyName, int]
) -> list[float]:
    """Find the maximum rate of each measure for a policy and a seed; in a process of its own."""
    policy, seed = case
    return [runs.max_rate(policy, seed, BOUNDS[name], start) for name in measures]


if __name__ == "__main__":
    main()
