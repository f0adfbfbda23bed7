"""Several copies of the model behind one coordinator."""

import pytest
from fake_server import VOCAB, GatedRunner, expected_tokens

from fastserve_mega.client import Client, ServerError
from fastserve_mega.coordinator.event_log import read_event_log
from fastserve_mega.system.config import SwapConfig
from fastserve_mega.types import FinishReason, SamplingParams

PROFILE = """{
 "prefill": [{"tokens": 1, "seconds": 0.001}, {"tokens": 1000, "seconds": 1.0}],
 "decode": [{"batch": 1, "context": 16, "seconds": 0.001}]
}"""
SWAP = SwapConfig(strategy="proactive", write_through_blocks=3, write_through_occupancy=0.3)
SCARCE = {"swap": SWAP, "device_blocks": 32, "host_blocks": 200, "max_batch_size": 5}


def params(count):
    return SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)


def prompt_of(number, tokens=20):
    return [1 + (number * 37 + j) % (VOCAB - 1) for j in range(tokens)]


class CountingRunner(GatedRunner):
    """Remembers which requests it has seen."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.seen = set()

    def execute(self, batch):
        self.seen |= {sequence.request_id for sequence in batch}
        return super().execute(batch)


@pytest.mark.parametrize(("ranks", "replicas"), [(2, 2), (4, 2), (3, 3)])
def test_requests_are_spread_and_answers_are_right(start_server, ranks, replicas):
    with start_server(
        ranks=ranks, replicas=replicas, make_runner=CountingRunner, **SCARCE
    ) as server:
        for runner in server.runners:
            runner.seen.clear()  # of the self-measurement
        with Client(server.endpoint) as client:
            running = [client.submit(prompt_of(i), params(30)) for i in range(12)]
            for i, generation in enumerate(running):
                assert generation.wait().token_ids == expected_tokens(prompt_of(i), 30)
            metrics = client.metrics()
    per_replica = ranks // replicas
    for first in range(0, ranks, per_replica):
        stages = server.runners[first : first + per_replica]
        assert all(stage.seen == stages[0].seen for stage in stages)
        assert len(stages[0].seen) >= 2
    for replica in range(replicas):
        assert f'fastserve_replica_requests{{replica="{replica}"}} 0.0' in metrics


def test_a_busy_replica_does_not_hold_up_the_other(start_server):
    with start_server(ranks=2, replicas=2) as server, Client(server.endpoint) as client:
        server.runners[0].open_gate.clear()
        stuck = client.submit(prompt_of(0), params(4))
        other = client.submit(prompt_of(1), params(1))  # comes second, so replica 0 is busy
        assert other.wait().token_ids == expected_tokens(prompt_of(1), 1)
        server.runners[0].open_gate.set()
        assert stuck.wait().token_ids == expected_tokens(prompt_of(0), 4)


def test_a_conversation_finds_its_prefix_again(start_server, tmp_path):
    # As measured on fake ranks, the length of a prompt would make no difference.
    profile = tmp_path / "profile.json"
    profile.write_text(PROFILE)
    options = {"ranks": 2, "replicas": 2, "profile": str(profile)}
    with start_server(**options) as server, Client(server.endpoint) as client:
        first = client.submit(prompt_of(1, 200), params(1)).wait()
        others = [client.submit(prompt_of(2 + i), params(1)) for i in range(4)]
        for other in others:
            other.wait()
        again = client.submit([*prompt_of(1, 200), 5, 6], params(1)).wait()
    assert first.usage.cached_tokens == 0
    assert again.usage.cached_tokens == 200


def test_a_cancelled_request_ends_on_its_replica(start_server):
    with start_server(ranks=2, replicas=2) as server, Client(server.endpoint) as client:
        running = [client.submit(prompt_of(i), params(400)) for i in range(4)]
        for generation in running:
            generation.cancel()
            assert generation.wait().finish_reason is FinishReason.ABORT
        assert client.submit(prompt_of(9), params(3)).wait().token_ids == expected_tokens(
            prompt_of(9), 3
        )


def test_a_replica_that_fails_ends_all(start_server):
    with start_server(ranks=2, replicas=2) as server, Client(server.endpoint) as client:
        server.runners[1].fail_with = RuntimeError("the device fell off")
        running = [client.submit(prompt_of(i), params(400)) for i in range(2)]
        for generation in running:
            with pytest.raises(ServerError, match=r"rank 1 failed.*the device fell off"):
                generation.wait()


def test_each_replica_has_an_event_log_that_replays(start_server, tmp_path):
    log = tmp_path / "run.jsonl"
    with start_server(
        ranks=4, replicas=2, coordinator={"event_log": str(log)}, **SCARCE
    ) as server, Client(server.endpoint) as client:  # fmt: skip
        running = [client.submit(prompt_of(i), params(30)) for i in range(12)]
        for generation in running:
            generation.wait()
    assert not log.exists()
    for replica in range(2):
        setup, calls = read_event_log(tmp_path / f"run.replica-{replica}.jsonl")
        scheduler = setup.make_scheduler()
        plans = 0
        for call in calls:
            assert scheduler.step(call.now, call.events) == call.plan
            plans += call.plan is not None
        assert plans > 30
