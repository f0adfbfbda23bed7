"""Losing the ranks is a pause and not an error, when somebody starts them again."""

import pytest
from fake_server import expected_tokens

from fastserve_mega.client import Client, ServerError
from fastserve_mega.messaging.messages import Restarting, Submit, Tokens
from fastserve_mega.types import FinishReason, SamplingParams

PROMPTS = [[1 + i, 2, 3, 4, 5] for i in range(3)]
COUNT = 200


def params():
    return SamplingParams(max_tokens=COUNT, temperature=0.0)


def test_answers_go_on_after_the_ranks_were_lost(start_server, tmp_path):
    options = {"coordinator": {"client_endpoint": f"ipc://{tmp_path}/clients"}, "supervised": True}
    with start_server(**options) as first:
        client = Client(first.endpoint)
        generations = [client.submit(prompt, params()) for prompt in PROMPTS]
        chunks = iter(generations[0])
        for _ in range(5):
            next(chunks)
        first.runner.fail_with = RuntimeError("the device fell off")
    assert first.ended_with is not None
    with client, start_server(**options):
        for prompt, generation in zip(PROMPTS, generations, strict=True):
            result = generation.wait()
            assert result.finish_reason is FinishReason.LENGTH
            assert result.token_ids == expected_tokens(prompt, COUNT)


def test_clients_are_told_to_be_patient(start_server, raw_client):
    with start_server(supervised=True, coordinator={"startup_timeout_s": 77.0}) as server:
        client = raw_client(server)
        client.send(Submit("patient", (1, 2), params()))
        assert isinstance(client.receive(), Tokens)
        server.runner.fail_with = RuntimeError("the device fell off")
        *_, last = client.receive_until(Restarting)
    assert last.within_s == 77.0
    assert "the device fell off" in last.reason


def test_without_a_supervisor_they_are_told_the_end(start_server):
    with start_server() as server, Client(server.endpoint) as client:
        generation = client.submit(PROMPTS[0], params())
        server.runner.fail_with = RuntimeError("the device fell off")
        with pytest.raises(ServerError, match="the device fell off"):
            generation.wait()
