"""A batch in the background takes what others leave."""

from __future__ import annotations

import pytest

from fastserve_mega.experiments.background import background_cost


@pytest.mark.parametrize(
    ("workload", "system", "rate", "load", "policy"),
    [
        ("sharegpt", "opt-13b-a100", 1.8, 0.6, "skip_join_mlfq"),
        ("arxiv", "llama-3-8b-h200", 9.9, 0.3, "paced"),
    ],
)
def test_who_waits_for_a_first_token_does_not_notice_a_batch(workload, system, rate, load, policy):
    """Though there is as much of it as the system can do, and it is another client's."""
    cost = background_cost(workload, system, policy, rate=rate, load=load, count=120)
    assert cost.ttft_beside.p95 < 1.1 * cost.ttft_alone.p95
    assert cost.jct_beside.mean < 1.2 * cost.jct_alone.mean
    assert cost.batch_tokens_per_s > 100
