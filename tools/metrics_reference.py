#!/usr/bin/env python3
"""Write the table of docs/metrics.md from the metrics themselves.

metrics_reference.py            # write it
metrics_reference.py --check    # exit status 1 when it is not current
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from fastserve_mega.metrics import ServingMetrics
from fastserve_mega.server.api_keys import KeyMetrics
from fastserve_mega.snapshot import PoolView, ReplicaView

TARGET = Path(__file__).parents[1] / "docs" / "metrics.md"
BEGIN, END = "<!-- begin: tools/metrics_reference.py -->\n", "<!-- end -->\n"
SAME_IN_VLLM = {
    "e2e_request_latency_seconds", "generation_tokens", "inter_token_latency_seconds",
    "iteration_tokens_total", "kv_cache_usage_perc", "num_requests_running", "num_requests_waiting",
    "prompt_tokens", "request_decode_time_seconds", "request_generation_tokens",
    "request_prefill_time_seconds", "request_prompt_tokens", "request_queue_time_seconds",
    "request_success", "request_time_per_output_token_seconds", "time_to_first_token_seconds",
}  # fmt: skip
OTHER_IN_VLLM = {
    "preemptions": "num_preemptions_total",
    "prefix_cache_hit_tokens": "prefix_cache_hits_total",
    "prefix_cache_queried_tokens": "prefix_cache_queries_total",
}
NOT_LABELS = {"le"}


def exposition() -> str:
    """The metrics of a server that has not served anything."""
    metrics = ServingMetrics(block_bytes=1, info={"model_name": "", "policy": "", "version": ""})
    pool = PoolView(owned=0, cached=0, capacity=1)
    view = ReplicaView(
        levels=(0,), quanta_s=(), requests=(), device=pool, host=pool, steps_in_flight=0,
        preemptions=0, swapped_out_blocks=0, swapped_in_blocks=0, recomputed_tokens=0,
        prefix_queried_tokens=0, prefix_hit_tokens=0,
    )  # fmt: skip
    scheduler = SimpleNamespace(view=lambda *_: view, place_lengths=lambda: (0, 0, 0))
    metrics.watch_schedulers([scheduler])
    keys = KeyMetrics()
    keys.begin("")
    return metrics.render() + keys.render()


def families() -> list[Metric]:
    """In the order of their names, without the times of creation."""
    found = text_string_to_metric_families(exposition())
    return sorted(
        (each for each in found if not each.name.endswith("_created")), key=lambda each: each.name
    )


def table(metrics: Iterable[Metric]) -> str:
    rows = ["| name | type | labels | meaning | vLLM |", "|---|---|---|---|---|"]
    for each in metrics:
        name = f"{each.name}_total" if each.type == "counter" else each.name
        labels = sorted({label for sample in each.samples for label in sample.labels} - NOT_LABELS)
        cells = (f"`{name}`", each.type, ", ".join(labels), each.documentation, vllm_name(each))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def vllm_name(metric: Metric) -> str:
    """What vLLM calls it; empty for what it does not measure."""
    short = metric.name.removeprefix("fastserve_")
    if short in SAME_IN_VLLM:
        return "the same"
    return f"`{OTHER_IN_VLLM[short]}`" if short in OTHER_IN_VLLM else ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    page = TARGET.read_text(encoding="utf-8")
    head, _, rest = page.partition(BEGIN)
    current = f"{head}{BEGIN}{table(families())}{END}{rest.partition(END)[2]}"
    if not options.check:
        TARGET.write_text(current, encoding="utf-8")
    elif page != current:
        print(f"{TARGET.name} is not current: run tools/metrics_reference.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
