"""What a batch costs those who wait: `python -m fastserve_mega.experiments.background`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

from rich.console import Console

from fastserve_mega.experiments.standing_set import at_rate, find_workload
from fastserve_mega.printing import FittedTable
from fastserve_mega.simulator.main import simulate
from fastserve_mega.simulator.report import Distribution, distribution
from fastserve_mega.types import BACKGROUND_PRIORITY

WORKLOADS = (
    ("sharegpt", "opt-13b-a100"),
    ("sharegpt", "llama-3-8b-a100"),
    ("arxiv", "llama-3-8b-h200"),
)
"""Workloads of the standing set, and systems."""


@dataclass(frozen=True, slots=True)
class BackgroundCost:
    """Latencies of requests that somebody waits for, without the batch and beside it; seconds."""

    ttft_alone: Distribution
    ttft_beside: Distribution
    jct_alone: Distribution
    jct_beside: Distribution
    batch_tokens_per_s: float
    """Tokens of the answers to the batch that were complete when the last of the others came."""


def background_cost(
    workload: str, system: str, policy: str, *, rate: float, load: float, count: int
) -> BackgroundCost:
    """Simulate both runs, with clients that are told apart.

    Args:
        workload: of the standing set; for the batch as well, which comes at the full rate.
        system: a shipped deployment.
        policy: of the scheduler.
        rate: requests per second that the system can do.
        load: requests that somebody waits for, over that rate.
        count: of these requests.
    """
    chosen = replace(find_workload(workload), system=system)
    config = chosen.under(policy)
    waited_for = [
        each._replace(client="people") for each in at_rate(chosen.draw(1, count), rate * load)
    ]
    span_s = waited_for[-1].arrival_s
    batch = [
        each._replace(client="batch", priority=BACKGROUND_PRIORITY)
        for each in at_rate(chosen.draw(2, max(int(span_s * rate), 1)), rate)
    ]
    both = sorted([*waited_for, *batch], key=lambda each: each.arrival_s)
    alone, beside = (
        list(zip(requests, simulate(config, requests).records, strict=True))
        for requests in (waited_for, both)
    )
    people = [record for spec, record in beside if not spec.priority]
    tokens = sum(
        spec.output_tokens for spec, record in beside if spec.priority and record.finish_s <= span_s
    )
    return BackgroundCost(
        distribution(record.ttft_s for _, record in alone),
        distribution(record.ttft_s for record in people),
        distribution(record.jct_s for _, record in alone),
        distribution(record.jct_s for record in people),
        tokens / span_s,
    )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--loads", default="0.3,0.6")
    parser.add_argument("--policies", default="paced,skip_join_mlfq")
    options = parser.parse_args()
    table = FittedTable(
        "workload", "policy", "load", "TTFT P95", "ratio", "JCT mean", "ratio", "batch tokens/s",
        title="without and beside a batch, s", text_columns=2,
    )  # fmt: skip
    for workload, system in WORKLOADS:
        rate = replace(find_workload(workload), system=system).saturation_rate(options.requests)
        for policy in options.policies.split(","):
            for load in map(float, options.loads.split(",")):
                cost = background_cost(
                    workload, system, policy, rate=rate, load=load, count=options.requests
                )
                ttft, jct = (
                    (f"{alone:.3f} / {beside:.3f}", f"x {beside / alone:.2f}")
                    for alone, beside in (
                        (cost.ttft_alone.p95, cost.ttft_beside.p95),
                        (cost.jct_alone.mean, cost.jct_beside.mean),
                    )
                )
                tokens = f"{cost.batch_tokens_per_s:,.0f}"
                table.add_row(f"{workload}, {system}", policy, f"{load:g}", *ttft, *jct, tokens)
    Console().print(table)


if __name__ == "__main__":
    main()
