"""What the metrics say of requests that run, wait and end."""

from fake_server import WAIT_MS

from fastserve_mega.messaging.messages import Finished, GetMetrics, Metrics, Ping, Pong, Submit
from fastserve_mega.types import RequestId, SamplingParams


def values(client):
    client.send(GetMetrics())
    *_, answer = client.receive_until(Metrics)
    lines = [line for line in answer.text.splitlines() if not line.startswith("#")]
    pairs = [line.rsplit(" ", 1) for line in lines]
    return {name.removeprefix("fastserve_"): float(value) for name, value in pairs}


def test_running_waiting_and_their_times(start_server, raw_client):
    with start_server() as server:
        client = raw_client(server)
        server.runner.entered.clear()
        server.runner.open_gate.clear()
        params = SamplingParams(max_tokens=5, ignore_eos=True)
        for name in "abc":
            client.send(Submit(RequestId(name), (1, 2, 3), params))
            assert server.runner.entered.wait(WAIT_MS / 1000)
        client.send(Ping())  # its answer leaves after the requests have reached the scheduler
        assert list(client.receive_until(Pong))
        found = values(client)
        counts = [found[f"num_requests_{place}"] for place in ("running", "waiting", "swapped")]
        assert counts == [1, 2, 0]
        assert 0 < found["kv_cache_usage_perc"] < 0.1
        server.runner.open_gate.set()
        for _ in "abc":
            list(client.receive_until(Finished))
        found = values(client)
    assert found["num_requests_running"] == found["num_requests_waiting"] == 0
    assert found["kv_cache_usage_perc"] == 0
    assert found["request_queue_time_seconds_count"] == 3
    assert found["request_time_per_output_token_seconds_count"] == 3
    assert found["inter_token_latency_seconds_count"] == 3 * 4
    assert found["request_generation_tokens_sum"] == 15
    assert found['request_success_total{finished_reason="length"}'] == 3
    assert found["iteration_tokens_total_sum"] == 3 * (3 + 4)
    assert any(name.startswith('info{model_name="fake-model') for name in found)
