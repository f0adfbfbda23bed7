"""A deployment has as many blocks as the smallest pool of all its ranks."""

from __future__ import annotations

import pytest
from fake_server import GatedRunner, expected_tokens

from fastserve_mega.client import Client
from fastserve_mega.system.config import SwapConfig
from fastserve_mega.types import SamplingParams

DEVICE_BLOCKS, HOST_BLOCKS = (64, 24, 40), (30, 90, 60)
"""Of each rank: a different one is the smallest in each memory."""


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
def test_the_smallest_pool_of_all_ranks_counts(start_server, order):
    """A block beyond a rank's pool would be an error there, and end all requests."""
    ranks = iter(order)

    def make_runner(**options):
        rank = next(ranks)
        sizes = {"device_blocks": DEVICE_BLOCKS[rank], "host_blocks": HOST_BLOCKS[rank]}
        return GatedRunner(**{**options, **sizes})

    options = {"ranks": 3, "swap": SwapConfig(strategy="proactive"), "max_batch_size": 4}
    with (
        start_server(make_runner=make_runner, **options) as server,
        Client(server.endpoint) as client,
    ):
        metrics = client.metrics()
        assert f'fastserve_device_blocks{{state="free"}} {min(DEVICE_BLOCKS) - 1}.0' in metrics
        assert f'fastserve_host_blocks{{state="free"}} {min(HOST_BLOCKS) - 1}.0' in metrics
        params = SamplingParams(max_tokens=30, temperature=0.0)
        answers = [client.submit((1 + i, 2, 3), params) for i in range(8)]
        for i, answer in enumerate(answers):
            assert answer.wait().token_ids == expected_tokens((1 + i, 2, 3), 30)
