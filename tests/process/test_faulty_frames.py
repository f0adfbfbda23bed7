"""What becomes of requests when frames and steps go wrong."""

import pytest
from fake_server import expected_tokens

from fastserve_mega import faults
from fastserve_mega.client import Client, ServerError
from fastserve_mega.types import SamplingParams

PROMPT = [1, 2, 3]
PARAMS = SamplingParams(max_tokens=20, temperature=0.0)


@pytest.fixture
def ask(monkeypatch):
    def set_faults(text):
        monkeypatch.setenv(faults.VARIABLE, text)

    return set_faults


@pytest.mark.parametrize("asked", ["rank.before_step:delay=0.001", "client.receive:delay=0.001"])
def test_what_is_late_changes_no_token(start_server, ask, asked):
    ask(asked)
    with start_server() as server, Client(server.endpoint) as client:
        answer = client.submit(PROMPT, PARAMS).wait()
    assert answer.token_ids == expected_tokens(PROMPT, 20)


def test_tokens_that_get_lost_are_noticed(start_server, ask):
    with start_server() as server:
        ask("client.receive:drop@4")  # the Welcome, and then tokens
        with Client(server.endpoint) as client, pytest.raises(ServerError, match="lost on the way"):
            client.submit(PROMPT, PARAMS).wait()


def test_a_step_whose_result_is_lost_is_a_lost_rank(start_server, ask):
    ask("rank.send:drop@40+")
    with (
        start_server(coordinator={"step_timeout_s": 0.5}) as server,
        Client(server.endpoint) as client,
        pytest.raises(ServerError, match="not returned"),
    ):
        client.submit(PROMPT, SamplingParams(max_tokens=400, temperature=0.0)).wait()
