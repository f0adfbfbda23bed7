"""A flood of one client does not hold up another."""

from __future__ import annotations

import pytest

from fastserve_mega.experiments.fairness import flood_cost


@pytest.mark.parametrize("policy", ["skip_join_mlfq", "fcfs"])
def test_a_flood_costs_another_client_a_step_and_no_queue(policy):
    """The capacity is 1.3 requests per second, and nearly twice as many come."""
    cost = flood_cost(policy, "opt-13b-a100", 1.8, 160, 1.3)
    assert cost.unknown.p95 > 100 * cost.alone.p95
    assert cost.shared.p95 < 1.2 * cost.alone.p95
