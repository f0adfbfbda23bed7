"""Whatever a report says at a great width it says at a small one, with nothing cut."""

import itertools
from pathlib import Path

import pytest
from rendering import WIDTHS, assert_fits, assert_says, rendered
from rich.progress_bar import ProgressBar

from fastserve_mega.bench.statistics import Record, summarize
from fastserve_mega.bench.tables import show_comparison, show_run
from fastserve_mega.commands.plan_report import print_plan
from fastserve_mega.doctor.doctor import print_findings
from fastserve_mega.doctor.finding import ok, problem, warning
from fastserve_mega.experiments.comparison_tables import print_comparison
from fastserve_mega.experiments.run_log import Run
from fastserve_mega.experiments.standing_set import find_workload
from fastserve_mega.messaging.messages import Snapshot
from fastserve_mega.printing import FittedTable
from fastserve_mega.simulator.replica import CopyStats
from fastserve_mega.simulator.report import Distribution, Report, make_tables
from fastserve_mega.slo import Slo
from fastserve_mega.snapshot import Percentiles, PoolView, ReplicaView, RequestView
from fastserve_mega.system.config_file import load_config
from fastserve_mega.system.deployment import plan_deployment
from fastserve_mega.system.locate import find_architecture
from fastserve_mega.terminal.top import render

CONFIGS = Path(__file__).parents[2] / "configs"
VERY_WIDE = 2000
FINDINGS = [
    ok("configuration", "configs/smollm2-135m-cpu.yaml"),
    warning(
        "Transformer Engine",
        "not in /usr/local/lib/python3.11/site-packages/transformer-engine-of-another-version",
        "pip install 'fastserve_mega[compat]' --find-links /opt/wheels/transformer-engine",
    ),
    problem("[red]", "a subject is not markup", "mend [it]"),
]


def figures(rows):
    table = FittedTable("request", "first token, s", "tokens in blocks", "bar", title="a title")
    for row in range(rows):
        table.add_row(f"number {row}", f"{row}.25", f"{row}04,857,600", ProgressBar(width=9))
        table.add_section()
    return table


def plan(console):
    path = CONFIGS / "opt-175b-16xa100.yaml"
    config = load_config(path, ["hardware.device_memory_gb=20", "parallel.data=3"])
    architecture, directory = find_architecture(config, path)
    print_plan(plan_deployment(config, architecture), config, directory, console)


def bench_run(console):
    show_run(run(None)["summary"], console)


def bench_comparison(console):
    loads = itertools.product((1.0, 2.5, 1000.0), (None, 16))
    show_comparison([run(*load) for load in loads], console)


def run(rate, concurrency=None):
    records = [
        Record(
            index=number, prompt_tokens=128, output_tokens=tokens, sent_s=0.0, ttft_s=1.2345,
            jct_s=1234.5678 + number,
        )
        for number, tokens in enumerate((16, 16, 256, 512))
    ]  # fmt: skip
    return {"rate": rate, "concurrency": concurrency, "summary": summarize(records)}


def top(console):
    requests = tuple(
        RequestView(str(number), number % 3, "swapped", number < 40, 5, 2, 6, 0.5)
        for number in range(240)
    )
    replica = ReplicaView(
        (123_456, 80, 80), (0.04, 1.5, 3.0), requests, PoolView(300_000, 10_000, 632_767),
        PoolView(5, 0, 0), 1, 712_345, 40, 0, 0, 0, 0,
    )  # fmt: skip
    latency = Percentiles(0.2, 0.123, 0.256, 3.0)
    after = Snapshot(12.0, (replica, replica), 100, 512_345, 4_212_345, latency, latency)
    console.print(render(after, after))


def simulation(console):
    times = Distribution(1234.5, 0.125, 98765.4, 0.0625)
    reports = [
        Report(
            policy=policy, rate=2.5, requests=2000, rejected=3, normalized_latency_s=times,
            ttft_s=times, tpot_s=times, jct_s=times, slowest_long_jct_s=1234.5,
            slowest_long_normalized_latency_s=9.5, requests_per_s=12.25, output_tokens_per_s=4321,
            utilization=0.99, elapsed_s=1e6, mean_batch_size=15.5, steps=10**6,
            decode_tokens=10**8, prefill_tokens=10**8, preemptions=33_000,
            recomputed_tokens=3_800_000, copies=CopyStats(exposed_s=123.25), gap_s=times,
            max_gap_s=1234.5, slo=Slo(), goodput=0.987, paper_goodputs=(0.1, 0.5, 1.0), play=0.95,
            recomputed_share=0.019, swapped_tokens=10**9, client_tokens_per_s={}, fairness=0.75,
        )
        for policy in ("skip_join_mlfq", "fixed_priority", "fcfs")
    ]  # fmt: skip
    for table in make_tables(reports, "sharegpt.csv: 161 prompt and 338 output tokens on average"):
        console.print(table)


def comparison(console):
    result = {
        "requests_per_s": 0.327, "goodput": 0.985, "play": 1.0, "ttft_s": {"p95": 0.153},
        "jct_s": {"mean": 12.74}, "gap_s": {"p99": 0.0877}, "max_gap_s": 344.4,
        "recomputed_share": 0.123,
    }  # fmt: skip
    slow = result | {"requests_per_s": 0.3, "goodput": 0.5, "max_gap_s": 1000.0}
    results = {
        Run("flood", 0.95, policy, seed): slow if policy == "mlfq" else result
        for policy in ("skip_join_mlfq", "mlfq", "fcfs")
        for seed in range(2)
    }
    workloads, rates = [find_workload("flood")], {"flood": 1.29}
    print_comparison(workloads, results, rates, Slo(), console)


REPORTS = {
    "figures": lambda console: console.print(figures(7)),
    "doctor": lambda console: print_findings(FINDINGS, console),
    "plan": plan,
    "bench, one run": bench_run,
    "bench, several runs": bench_comparison,
    "top": top,
    "simulate": simulation,
    "compare-policies": comparison,
}


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "piped"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", REPORTS)
def test_no_word_or_figure_is_lost(name, width, terminal):
    text = rendered(REPORTS[name], width, terminal=terminal)
    assert "…" not in text
    assert_says(text, [rendered(REPORTS[name], VERY_WIDE)])
    if terminal and name != "doctor":  # whose paths are longer than a line
        assert_fits(text, width)


def test_a_wide_terminal_has_a_row_for_each_record():
    text = rendered(lambda console: console.print(figures(3)), VERY_WIDE)
    assert [line.count("number") for line in text.splitlines()].count(1) == 3


@pytest.mark.parametrize("width", [34, 40, 60])
def test_a_narrow_terminal_has_columns_for_the_records(width):
    table = FittedTable("request", "first token", "second token", "third token", "fourth token")
    for number in range(4):
        table.add_row(f"r{number}", "1,000,000", "2", "3", "4")
    text = rendered(lambda console: console.print(table), width)
    assert_says(text, ["r0 r1 r2 r3", "1,000,000 " * 4, "first second third fourth"])
    assert_fits(text, width)


def test_a_word_longer_than_a_line_is_folded_and_not_cut():
    table = FittedTable("file", "size")
    table.add_row("/a" * 60, "1")
    text = rendered(lambda console: console.print(table), 60)
    assert text.count("a") == 60
    assert_fits(text, 60)


def test_strings_are_not_markup_and_missing_cells_are_empty():
    table = FittedTable("a", "b", "c")
    table.add_row("[red]x[/red]")
    assert "[red]x[/red]" in rendered(lambda console: console.print(table), 60)


def test_a_path_in_a_finding_can_be_copied_at_any_width():
    for width in WIDTHS:
        text = rendered(lambda console: print_findings(FINDINGS, console), width)
        assert all(word in text for each in FINDINGS for word in each.found.split())
