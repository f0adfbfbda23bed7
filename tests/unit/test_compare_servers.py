"""Ratios of servers that were measured in turns, and what is left out of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from rendering import rendered

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from comparison import Run, counted, ratios, show


def run(server, number, speed, *, others=0.0, completed=4):
    latency = {"ttft_s": {"mean": 0.5, "p95": 0.75}, "normalized_latency_s": {"mean": 0.25}}
    summary = {"requests": 4, "completed": completed, "errors": {}, "latency": {"all": latency}}
    if completed < 4:
        summary["errors"] = {"the server counts 3 tokens of an answer of 4": 4 - completed}
    return Run(
        "plentiful", "burst", server, number, others, {**summary, "output_tokens_per_s": speed}
    )


OURS = [run("ours", 0, 60.0), run("ours", 1, 100.0), run("ours", 2, 90.0)]
PEER = [run("peer", 0, 40.0), run("peer", 1, 50.0), run("peer", 2, 50.0)]


def test_a_ratio_is_of_two_runs_of_the_same_round():
    assert ratios(OURS, PEER, 0.05) == pytest.approx([1.5, 1.8, 2.0])


def test_a_run_that_was_disturbed_counts_only_where_no_other_is():
    disturbed = run("ours", 1, 10.0, others=0.06)
    assert counted([OURS[0], disturbed], 0.05) == [OURS[0]]
    assert counted([disturbed], 0.05) == [disturbed]
    assert ratios([OURS[0], disturbed], PEER, 0.05) == pytest.approx([1.5])


def test_a_run_with_a_request_that_failed_never_counts():
    failed = run("peer", 0, 1000.0, completed=3)
    assert counted([failed], 0.05) == []
    assert ratios(OURS[:1], [failed], 0.05) == []


def test_the_table_has_the_ratio_the_marks_and_the_error():
    runs = [*OURS, *PEER[:2], run("peer", 2, 50.0, others=0.3), run("broken", 0, 0.0, completed=0)]
    text = rendered(lambda console: show(runs, "peer", 0.05, console), 200)
    assert "1.75 (1.50 - 2.00)" in text
    assert "2 of 3" in text
    assert "0.30 busy" in text
    assert "the server counts 3 tokens of an answer of 4" in text
