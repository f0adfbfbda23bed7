"""Metrics by hand, their table, and the dashboard that shows them."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import metrics_reference

from fastserve_mega.metrics import ServingMetrics
from fastserve_mega.metrics.requests import BulkHistogram
from fastserve_mega.plan import Plan, SequenceSlice
from fastserve_mega.types import FinishReason, RequestId, Usage

DASHBOARD = Path(__file__).parents[2] / "launch" / "grafana" / "fastserve_mega.json"


def samples(metrics):
    """Value by name and labels, without `fastserve_` and times of creation."""
    return {
        (sample.name.removeprefix("fastserve_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(metrics.render())
        for sample in family.samples
    }


@dataclass
class Observed:
    usage: Usage
    arrived_at: float = 100.0
    started_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None


def test_the_times_of_a_request_by_hand():
    metrics = ServingMetrics(block_bytes=1)
    metrics.requests.observe_arrival(10)
    metrics.requests.observe_start(1.0)
    request = Observed(Usage(10, 3), started_at=101.0)
    for now in (102.0, 102.5, 104.0):
        metrics.requests.observe_token(request, now)
        request.first_token_at = request.first_token_at or now
        request.last_token_at = now
    plan = Plan(1, (SequenceSlice(RequestId("a"), 0, 10, True, 0, ()),))
    metrics.observe_step(plan, 0.5, 0.0)
    metrics.requests.observe_finish(FinishReason.LENGTH, request, 104.25)
    metrics.requests.observe_rejection()
    found = samples(metrics)
    sums = {
        "time_to_first_token_seconds": 2.0,
        "inter_token_latency_seconds": 2.0,
        "request_time_per_output_token_seconds": 1.0,
        "e2e_request_latency_seconds": 4.25,
        "request_queue_time_seconds": 1.0,
        "request_prefill_time_seconds": 1.0,
        "request_decode_time_seconds": 2.0,
        "request_prompt_tokens": 10,
        "request_generation_tokens": 3,
        "iteration_tokens_total": 10,
    }
    for name, value in sums.items():
        assert found[f"{name}_sum",] == pytest.approx(value), name
        assert found[f"{name}_count",] == (2 if name.startswith("inter") else 1), name
    assert found["request_finished_total", "length"] == 1
    assert found["request_finished_total", "rejected"] == 1
    assert found["request_success_total", "length"] == 1
    assert found["request_success_total", "stop"] == 0
    assert found["generation_tokens_total",] == 3


def test_a_request_that_ended_before_its_first_token():
    metrics = ServingMetrics(block_bytes=1)
    metrics.requests.observe_finish(FinishReason.TIMEOUT, Observed(Usage(10, 0)), 103.0)
    found = samples(metrics)
    assert found["e2e_request_latency_seconds_sum",] == 3.0
    assert found["request_prefill_time_seconds_count",] == 0
    assert ("request_success_total", "timeout") not in found


def test_a_bulk_histogram_equals_prometheus_own():
    values = [(0.1, 3), (0.5, 1), (0.500001, 2), (7.0, 4)]
    own, theirs = CollectorRegistry(), CollectorRegistry()
    bulk = BulkHistogram("a", "b", buckets=(0.1, 0.5, 2), registry=own)
    single = Histogram("a", "b", buckets=(0.1, 0.5, 2), registry=theirs)
    for value, count in values:
        bulk.observe(value, count)
        for _ in range(count):
            single.observe(value)
    lines = [
        [line for line in generate_latest(each).decode().splitlines() if "_created" not in line]
        for each in (own, theirs)
    ]
    assert lines[0][:-2] == [line for line in lines[1] if not re.match("a_(sum|count)", line)]
    assert {line.split()[0]: pytest.approx(float(line.split()[1])) for line in lines[0][2:]} == {
        line.split()[0]: float(line.split()[1]) for line in lines[1][2:]
    }


# --- the table and the dashboard -----------------------------------------------------------------


def test_the_table_is_current(capsys):
    assert metrics_reference.main(["--check"]) == 0, capsys.readouterr().out


def test_the_table_names_every_metric_and_explains_it():
    page = metrics_reference.TARGET.read_text(encoding="utf-8")
    families = metrics_reference.families()
    assert len(families) > 30
    for family in families:
        assert f"`{family.name}" in page
        assert len(family.documentation) > 3
    names = {family.name.removeprefix("fastserve_") for family in families}
    assert names >= metrics_reference.SAME_IN_VLLM | set(metrics_reference.OTHER_IN_VLLM)


def dashboard():
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    return board, panels, [target["expr"] for panel in panels for target in panel["targets"]]


def exposed():
    """Names that a query can ask for."""
    return {sample.name for family in metrics_reference.families() for sample in family.samples}


def test_the_dashboard_asks_for_what_there_is():
    board, _, expressions = dashboard()
    variables = json.dumps(board["templating"])
    used = set(re.findall(r"fastserve_\w+", " ".join(expressions) + variables))
    assert len(used) > 30
    assert not used - exposed()


def test_the_dashboard_groups_by_labels_that_there_are():
    labels = {
        (sample.name, label)
        for family in metrics_reference.families()
        for sample in family.samples
        for label in sample.labels
    }
    grouped = 0
    for expression in dashboard()[2]:
        if match := re.search(r"by \(([\w, ]+)\) \(?(?:rate\()?\(?(fastserve_\w+)", expression):
            grouped += 1
            for label in match[1].split(", "):
                assert (match[2], label) in labels, expression
    assert grouped > 20


def test_the_dashboard_is_well_formed():
    board, panels, expressions = dashboard()
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    assert all(expression.count("(") == expression.count(")") for expression in expressions)
    cells = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in board["panels"]
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert all(panel["title"] and panel["targets"] for panel in panels)
