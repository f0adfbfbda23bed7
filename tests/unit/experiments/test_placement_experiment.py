"""Requests for many replicas, and the comparison of rules of placement, on small samples."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from fastserve_mega.experiments import placement
from fastserve_mega.experiments.placement_rules import RULES
from fastserve_mega.experiments.placement_workloads import PREAMBLE_TOKENS, WORKLOADS
from fastserve_mega.simulator.replica import Outage
from fastserve_mega.simulator.simulation import Simulation

BY_NAME = {workload.name: workload for workload in WORKLOADS}


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda each: each.name)
def test_requests_come_at_the_rate_and_in_order_and_again_for_the_same_seed(workload):
    first, again = (workload.generate(np.random.default_rng(3), 2_000, 50.0) for _ in range(2))
    assert first == again
    assert len(first) == 2_000
    assert all(a.arrival_s <= b.arrival_s for a, b in pairwise(first))
    assert first[-1].arrival_s == pytest.approx(2_000 / 50.0, rel=0.15)


def test_a_turn_repeats_all_that_was_said_before_it():
    requests = BY_NAME["conversations"].generate(np.random.default_rng(0), 500, 20.0)
    last = {}
    turns = 0
    for spec in requests:
        if before := last.get(spec.session):
            turns += 1
            assert spec.prompt_tokens > before.prompt_tokens + before.output_tokens
            assert spec.arrival_s > before.arrival_s
        last[spec.session] = spec
    assert turns > len(requests) / 2


def test_some_preambles_are_much_more_popular_than_others():
    requests = BY_NAME["preambles"].generate(np.random.default_rng(0), 1_000, 20.0)
    counts = sorted(
        (
            sum(each.preamble == name for each in requests)
            for name in {r.preamble for r in requests}
        ),
        reverse=True,
    )
    assert counts[0] > 10 * counts[len(counts) // 2]
    assert all(each.prompt_tokens > each.preamble_tokens == PREAMBLE_TOKENS for each in requests)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_does_without_a_replica_that_is_lost(rule):
    workload = BY_NAME["conversations"]
    requests = workload.generate(np.random.default_rng(0), 60, 15.0)
    replicas = placement.build(workload, 3)
    outages = [Outage(1, 1.0, 3.0)]
    result = Simulation(
        replicas, requests, max_queued_requests=999, make_placer=RULES[rule], outages=outages
    ).run()
    assert (result.finished, result.rejected) == (60, 0)
    assert result.output_tokens == sum(each.output_tokens for each in requests)
    assert all(replica.steps for replica in replicas)


def test_replicas_of_two_speeds_make_a_load_of_their_sum():
    alike, uneven = BY_NAME["conversations"], BY_NAME["uneven"]
    one, four = (placement.full_rate(alike, count) for count in (1, 4))
    assert four == pytest.approx(4 * one)
    assert placement.full_rate(uneven, 4) > 1.3 * four


def test_a_comparison_prints_all_rules_and_goes_on_where_it_stopped(capsys, tmp_path, monkeypatch):
    log = tmp_path / "runs.jsonl"
    arguments = ["--replicas", "2", "--requests", "15", "--seeds", "2"]
    arguments += ["--workloads", "conversations", "--json", str(log)]
    assert placement.main(arguments) == 0
    first = capsys.readouterr().out
    assert all(rule in first for rule in RULES)
    monkeypatch.setattr(placement, "measure", None)  # nothing is simulated again
    assert placement.main(arguments) == 0
    assert capsys.readouterr().out == first
