"""What a watcher is told, through the whole server."""

import pytest
from fake_server import VOCAB, WAIT_MS

from fastserve_mega.client import Client
from fastserve_mega.messaging.messages import GetSnapshot, Refused
from fastserve_mega.system.config import SwapConfig
from fastserve_mega.types import SamplingParams

ENDLESS = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
SWAP = SwapConfig(strategy="reactive")


def prompt_of(number, tokens=20):
    return [1 + (number * 37 + j) % (VOCAB - 1) for j in range(tokens)]


def test_an_idle_server(start_server):
    options = {"device_blocks": 64, "host_blocks": 9, "swap": SWAP}
    with start_server(**options) as server, Client(server.endpoint) as client:
        snapshot = client.snapshot()
    (replica,) = snapshot.replicas
    assert sum(replica.levels) == 0
    assert len(replica.quanta_s) == len(replica.levels)
    assert list(replica.quanta_s) == sorted(replica.quanta_s)
    assert (replica.device.capacity, replica.host.capacity) == (63, 8)
    assert (replica.device.owned, replica.requests, snapshot.generation_tokens) == (0, (), 0)
    assert snapshot.ttft_s.p95 == 0.0


def test_requests_are_shown_where_they_are(start_server):
    with start_server(max_batch_size=2) as server, Client(server.endpoint) as client:
        running = [client.submit(prompt_of(i), ENDLESS) for i in range(4)]
        for generation in running[:2]:
            next(iter(generation))
        server.runner.entered.clear()
        server.runner.open_gate.clear()
        assert server.runner.entered.wait(WAIT_MS / 1000)
        snapshot = client.snapshot()
        (replica,) = snapshot.replicas
        assert sum(replica.levels) == len(replica.requests) == 4
        assert {view.request_id for view in replica.requests} == {g.request_id for g in running}
        flying = [view for view in replica.requests if view.running]
        assert len(flying) == 2
        assert all(view.place == "resident" and view.waited_s == 0.0 for view in flying)
        assert all(view.num_prompt_tokens == 20 for view in replica.requests)
        assert replica.steps_in_flight == 1
        assert replica.device.owned >= 10
        assert snapshot.generation_tokens >= 2
        assert snapshot.prompt_tokens == 80
        assert len(client.snapshot(max_requests=3).replicas[0].requests) == 3
        server.runner.open_gate.set()
        for generation in running:
            generation.cancel()
        after = client.snapshot()
    assert after.finished_requests == 4
    assert 0.0 < after.ttft_s.p50 <= after.ttft_s.p99
    assert after.jct_s.mean > 0.0
    assert after.clock_s > snapshot.clock_s


@pytest.mark.parametrize("limit", [-1, "ten"])
def test_nonsense_is_refused(start_server, raw_client, limit):
    with start_server() as server:
        client = raw_client(server)
        client.send(GetSnapshot(max_requests=limit))
        refused = client.receive()
        assert isinstance(refused, Refused)
        assert "max_requests" in refused.message
