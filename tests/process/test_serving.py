"""A whole server without a model: every token is checked against an undisturbed run."""

import pytest
from fake_server import VOCAB, WAIT_MS, expected_tokens

from fastserve_mega.client import Client, InvalidRequestError, ServerBusyError, ServerError
from fastserve_mega.messaging.messages import Cancel, Finished, Refused, Submit, Tokens
from fastserve_mega.types import FinishReason, SamplingParams, Usage

GREEDY = {"temperature": 0.0, "seed": 1}


def greedy(max_tokens):
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=1)


@pytest.mark.parametrize("policy", ["skip_join_mlfq", "paced", "mlfq", "fcfs", "fixed_priority"])
def test_many_requests_with_little_memory_get_the_tokens_of_an_undisturbed_run(
    start_server, policy
):
    # 31 blocks of 4 tokens for 12 requests of up to 100: all of them are preempted again and again.
    with start_server(
        policy=policy, device_blocks=32, max_batch_size=5, max_batch_tokens=16
    ) as server, Client(server.endpoint) as client:  # fmt: skip
        jobs = []
        for i in range(12):
            prompt = [1 + (i * 37 + j) % (VOCAB - 1) for j in range(1 + 7 * i)]
            count = 5 + (i * 11) % 23
            jobs.append((prompt, count, client.submit(prompt, greedy(count))))
        for prompt, count, generation in jobs:
            assert generation.wait().token_ids == expected_tokens(prompt, count)
            assert generation.finish_reason is FinishReason.LENGTH
            assert generation.usage == Usage(len(prompt), count)
        # Metrics and the state behind them: everything came back.
        metrics = client.metrics()
        assert 'fastserve_device_blocks{state="owned"} 0.0' in metrics
        preemptions = metrics.split("\nfastserve_preemptions_total ")[1].split("\n")[0]
        assert float(preemptions) > 0 or policy in ("fcfs", "fixed_priority")


def test_a_resumed_request_goes_on_where_the_client_stands(start_server, raw_client):
    prompt, whole = (5, 6, 7), expected_tokens((5, 6, 7), 10)
    with start_server() as server:
        client = raw_client(server)
        client.send(Submit("again", prompt, greedy(10), received=whole[:4]))
        *tokens, finished = client.receive_until(Finished)
        assert tuple(t for message in tokens for t in message.token_ids) == whole[4:]
        assert [message.offset for message in tokens] == list(range(4, 10))
        assert finished.reason is FinishReason.LENGTH
        assert finished.usage == Usage(3, 10)


def test_submitting_an_unfinished_request_again_moves_it_to_the_new_connection(
    start_server, raw_client
):
    submit = Submit("same", (5, 6, 7), greedy(10))
    with start_server() as server:
        old, new = raw_client(server), raw_client(server)
        server.runner.entered.clear()
        server.runner.open_gate.clear()
        old.send(submit)
        assert server.runner.entered.wait(WAIT_MS / 1000)
        new.send(submit)
        other = Submit("same", (9, 9), greedy(10))
        old.send(other)
        refused = old.receive()
        assert isinstance(refused, Refused)
        assert "in use" in refused.message
        server.runner.open_gate.set()
        *tokens, _ = new.receive_until(Finished)
        assert tuple(t for m in tokens for t in m.token_ids) == expected_tokens((5, 6, 7), 10)


def test_stop_tokens_end_a_request_and_are_its_last_token(start_server):
    whole = expected_tokens((5, 6, 7), 10)
    params = SamplingParams(max_tokens=10, temperature=0.0, stop_token_ids=(whole[3],))
    with start_server() as server, Client(server.endpoint) as client:
        generation = client.submit((5, 6, 7), params).wait()
    assert generation.token_ids == whole[: whole.index(whole[3]) + 1]
    assert generation.finish_reason is FinishReason.STOP


def test_cancel_frees_everything_and_others_go_on(start_server, raw_client):
    with start_server(device_blocks=64) as server:
        client, other = raw_client(server), raw_client(server)
        client.send(Submit("long", (1, 2, 3), greedy(200)))
        other.send(Submit("other", (4, 5), greedy(50)))
        assert isinstance(client.receive(), Tokens)
        client.send(Cancel("long"))
        *_, finished = client.receive_until(Finished)
        assert finished.reason is FinishReason.ABORT
        *tokens, _ = other.receive_until(Finished)
        assert tuple(t for m in tokens for t in m.token_ids) == expected_tokens((4, 5), 50)
        with Client(server.endpoint) as reader:
            assert 'fastserve_device_blocks{state="owned"} 0.0' in reader.metrics()


def test_a_timeout_ends_the_request(start_server, raw_client):
    with start_server() as server:
        client = raw_client(server)
        server.runner.entered.clear()
        server.runner.open_gate.clear()
        client.send(Submit("slow", (1, 2, 3), greedy(200), timeout_s=0.01))
        *_, finished = client.receive_until(Finished)
        assert finished.reason is FinishReason.TIMEOUT
        assert "0.01 s" in finished.message


def test_too_many_requests_are_rejected_at_once(start_server):
    with start_server(max_queued_requests=1) as server, Client(server.endpoint) as client:
        server.runner.open_gate.clear()
        first = client.submit((1, 2), greedy(4))
        with pytest.raises(ServerBusyError, match="the limit is 1"):
            client.submit((3, 4), greedy(4)).wait()
        server.runner.open_gate.set()
        assert first.wait().token_ids == expected_tokens((1, 2), 4)


def test_a_failing_step_fails_every_waiting_request(start_server):
    with start_server() as server, Client(server.endpoint) as client:
        server.runner.fail_with = RuntimeError("the device fell off the bus")
        with pytest.raises(ServerError, match=r"rank 0 failed: .*fell off the bus"):
            client.submit((1, 2), greedy(4)).wait()


def test_a_step_that_never_returns_leaves_nobody_waiting(start_server):
    options = {"coordinator": {"step_timeout_s": 1.0}}
    with start_server(**options) as server, Client(server.endpoint) as client:
        server.runner.open_gate.clear()
        with pytest.raises(ServerError, match="has not returned within 1 s"):
            client.submit((1, 2), greedy(4)).wait()


def test_over_long_requests_are_refused_with_the_limit(start_server):
    with start_server() as server, Client(server.endpoint) as client:
        with pytest.raises(InvalidRequestError, match=r"500 .* 13 .* 512"):
            client.submit([1] * 500, greedy(13)).wait()
        assert len(client.submit([1] * 500, greedy(12)).wait().token_ids) == 12


def test_the_context_is_what_the_pool_has_room_for(start_server):
    with start_server(device_blocks=4) as server, Client(server.endpoint) as client:
        assert client.info().max_context == 12
        with pytest.raises(InvalidRequestError, match=r"10 .* 3 exceed the context of 12 tokens"):
            client.submit([1] * 10, greedy(3)).wait()
        assert len(client.submit([1] * 10, greedy(2)).wait().token_ids) == 2
