"""Log probabilities of a prompt's tokens, through chunked prefill and what may interrupt it."""

from __future__ import annotations

import pytest
from fake_server import fake_server

from fastserve_mega.client import Client
from fastserve_mega.types import SamplingParams

PROMPT = tuple(range(40, 75))
ASKING = SamplingParams(max_tokens=3, temperature=0.0, logprobs=0, prompt_logprobs=True)


def expected(prompt):
    """What `FakeModelRunner` tells of a prompt."""
    return [None, *(-float(token) for token in prompt[1:])]


def told(generation):
    return [each and each.logprob for each in generation.prompt_logprobs]


@pytest.mark.parametrize("replicas", [1, 2])
def test_each_token_of_the_prompt_is_told_once(model_directory, replicas):
    options = {"max_batch_tokens": 8, "ranks": 2, "replicas": replicas}
    with fake_server(model_directory, **options) as server, Client(server.endpoint) as client:
        plain = client.submit(PROMPT, SamplingParams(max_tokens=3, temperature=0.0)).wait()
        assert plain.prompt_logprobs == ()
        for _ in range(2):  # what the prefix cache knows is computed all the same
            generation = client.submit(PROMPT, ASKING).wait()
            assert told(generation) == expected(PROMPT)
            assert generation.token_ids == plain.token_ids
        lone = client.submit((7,), ASKING).wait()
        assert lone.prompt_logprobs == (None,)


def test_prompts_that_are_computed_again_are_told_as_once(model_directory):
    """With half the memory that they need, requests are preempted and computed anew."""
    options = {"max_batch_tokens": 8, "device_blocks": 16}
    with fake_server(model_directory, **options) as server, Client(server.endpoint) as client:
        prompts = [tuple(range(start, start + 20)) for start in (10, 50, 90)]
        params = SamplingParams(max_tokens=12, temperature=0.0, logprobs=0, prompt_logprobs=True)
        generations = [client.submit(prompt, params) for prompt in prompts]
        for prompt, generation in zip(prompts, generations, strict=True):
            assert told(generation.wait()) == expected(prompt)
