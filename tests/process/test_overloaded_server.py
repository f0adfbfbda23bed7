"""Several times the capacity for a moment: the tool itself runs for minutes."""

import asyncio
import time
from argparse import Namespace
from types import SimpleNamespace

import pytest
from fake_server import VOCAB, GatedRunner
from system import overload
from system.overload_checks import Workload

from fastserve_mega.system.config import SwapConfig

WORKLOAD = Workload(
    prompts=[[1 + (7 * i + j) % (VOCAB - 1) for j in range(3 + 2 * i)] for i in range(12)],
    prefix=range(100, 120),
    answer_lengths=range(2, 30),
)
OPTIONS = Namespace(
    seed=0, load=6.0, measure=0.4, concurrency=16, seconds=1.0, limit=20.0, growth_limit=64.0
)


class SlowSteps(GatedRunner):
    """Slower than its clients, so that they can overload it."""

    def execute(self, batch):
        time.sleep(0.005)
        return super().execute(batch)


@pytest.mark.parametrize(
    ("strategy", "host_blocks"),
    [("proactive", 0), ("proactive", 4), ("proactive", 100), ("reactive", 100), ("recompute", 0)],
)
def test_an_overloaded_server_comes_out_whole(start_server, strategy, host_blocks):
    settings = {
        "device_blocks": 32, "host_blocks": host_blocks, "max_batch_size": 4,
        "max_batch_tokens": 16, "max_queued_requests": 16, "make_runner": SlowSteps,
        "swap": SwapConfig(strategy=strategy),
    }  # fmt: skip
    with start_server(**settings) as server:
        deployment = SimpleNamespace(check=lambda: None)
        run = asyncio.run(overload.overload(deployment, server.endpoint, WORKLOAD, OPTIONS))
    assert [finding for finding in run.findings if not finding.holds] == []
    assert len(run.outcomes) > 2 * OPTIONS.seconds * run.capacity.requests_per_s
    assert run.metrics["preemptions_total"] > 0
    tables = overload.render(run, OPTIONS.seconds)
    assert [table.row_count for table in tables][-1] == len(run.findings)
