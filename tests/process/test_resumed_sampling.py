"""A request that goes on elsewhere samples what it would have sampled."""

from __future__ import annotations

import msgspec
import pytest
from fake_server import fake_server
from test_sampling_options import SamplingRunner

from fastserve_mega.client import Client
from fastserve_mega.messaging.messages import Finished, Submit, Tokens
from fastserve_mega.system.config import SwapConfig
from fastserve_mega.types import SamplingParams

PROMPT = tuple(range(5, 25))
OPTIONS = {
    "plain": {},
    "presence_penalty": {"presence_penalty": 1.5},
    "frequency_penalty": {"frequency_penalty": -0.7},
    "repetition_penalty": {"repetition_penalty": 0.5},
    "all": {
        "presence_penalty": -1.0, "frequency_penalty": -1.0, "repetition_penalty": 0.7,
        "min_p": 0.01, "logit_bias": {9: 2.0}, "top_k": 50, "top_p": 0.9, "logprobs": 1,
    },
}  # fmt: skip


def params_of(name, **change):
    fields = {"max_tokens": 24, "seed": 11, "ignore_eos": True, "temperature": 0.8}
    return SamplingParams(**{**fields, **OPTIONS[name], **change})


@pytest.fixture(scope="module")
def server(model_directory):
    with fake_server(model_directory, make_runner=SamplingRunner) as server:
        yield server


@pytest.fixture(scope="module")
def undisturbed(server):
    with Client(server.endpoint) as client:
        return {name: client.submit(PROMPT, params_of(name)).wait() for name in OPTIONS}


@pytest.mark.parametrize("name", OPTIONS)
def test_after_a_restart(name, undisturbed, model_directory, raw_client):
    """A new coordinator and new ranks, which know only what the client brings along."""
    expected = undisturbed[name].token_ids
    received = expected[:9]
    with fake_server(model_directory, make_runner=SamplingRunner) as server:
        client = raw_client(server)
        for request_id in ("first", "with the prefix cache"):
            submit = Submit(request_id, PROMPT, params_of(name), received)
            client.send(submit)
            *tokens, _ = client.receive_until(Finished)
            rest = tuple(token for message in tokens for token in message.token_ids)
            assert rest == expected[9:]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("strategy", ["recompute", "proactive"])
def test_preempted(name, strategy, undisturbed, model_directory):
    """Blocks for two of six requests; chunks of the prompt."""
    options = {
        "make_runner": SamplingRunner, "device_blocks": 24, "host_blocks": 256,
        "max_batch_tokens": 8, "swap": SwapConfig(strategy=strategy), "ranks": 2,
    }  # fmt: skip
    with fake_server(model_directory, **options) as server, Client(server.endpoint) as client:
        answers = [
            client.submit(PROMPT, params_of(name, seed=11 if i == 3 else i), cache_salt=str(i))
            for i in range(6)
        ]
        done = [answer.wait() for answer in answers]
        preemptions = float(client.metrics().split("\nfastserve_preemptions_total ")[1].split()[0])
    assert preemptions > 0
    assert done[3].token_ids == undisturbed[name].token_ids
    assert len({answer.token_ids for answer in done}) == 6


def test_a_client_that_comes_back_gets_the_logprobs_it_missed(server, undisturbed, raw_client):
    runner = server.runner
    first, second = raw_client(server), raw_client(server)
    submit = Submit("moves", PROMPT, params_of("all"))
    first.send(submit)
    message = first.receive()
    runner.open_gate.clear()
    try:
        received = undisturbed["all"].token_ids[: len(message.token_ids)]
        second.send(msgspec.structs.replace(submit, received=received))
    finally:
        runner.open_gate.set()
    *tokens, _ = second.receive_until(Finished)
    assert all(isinstance(each, Tokens) for each in tokens)
    told = tuple(logprobs for each in tokens for logprobs in each.logprobs)
    assert told == undisturbed["all"].logprobs[len(received) :]
