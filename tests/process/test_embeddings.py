"""Embeddings through the scheduler: chunks, the prefix cache, preemption, several copies."""

from __future__ import annotations

import pytest
from fake_server import fake_server

from fastserve_mega.client import Client
from fastserve_mega.types import FinishReason, SamplingParams
from fastserve_mega.worker.fake_runner import fake_embedding

PROMPT = tuple(range(40, 75))
ASKING = SamplingParams(max_tokens=1, temperature=0.0, embeds=True)


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_prompt_has_the_same_embedding_in_chunks_and_with_kv_that_is_known(
    model_directory, replicas
):
    options = {"max_batch_tokens": 8, "ranks": 2, "replicas": replicas}
    with fake_server(model_directory, **options) as server, Client(server.endpoint) as client:
        for known in (0, 32):
            generations = [client.submit(PROMPT, ASKING) for _ in range(replicas)]
            for generation in generations:
                assert generation.wait().embedding == fake_embedding(PROMPT)
            assert max(each.usage.cached_tokens for each in generations) >= known
            assert generation.finish_reason is FinishReason.LENGTH
        plain = client.submit(PROMPT, SamplingParams(max_tokens=1, temperature=0.0)).wait()
        assert plain.token_ids == generation.token_ids
        assert plain.embedding == b""


def test_embeddings_reach_those_who_ask_when_memory_runs_out(model_directory):
    """Among requests that are preempted and computed anew."""
    options = {"max_batch_tokens": 8, "device_blocks": 16}
    with fake_server(model_directory, **options) as server, Client(server.endpoint) as client:
        prompts = [tuple(range(start, start + 20)) for start in (10, 50, 90)]
        talking = SamplingParams(max_tokens=12, temperature=0.0)
        talks = [client.submit(prompt, talking) for prompt in prompts]
        embeddings = [client.submit(prompt[:-1], ASKING) for prompt in prompts]
        for prompt, generation in zip(prompts, embeddings, strict=True):
            assert generation.wait().embedding == fake_embedding(prompt[:-1])
        assert all(len(talk.wait().token_ids) == 12 for talk in talks)


def test_an_embedding_is_sent_again_to_whoever_asks_again(model_directory):
    with fake_server(model_directory) as server:
        steps = set()
        for _ in range(2):
            with Client(server.endpoint) as client:
                generation = client.submit(
                    PROMPT, ASKING, request_id="mine", fingerprint="one"
                ).wait()
                assert generation.embedding == fake_embedding(PROMPT)
            steps.add(server.runner.steps)
        assert len(steps) == 1  # it was not computed again


def test_an_embedding_of_more_than_one_token_is_refused():
    with pytest.raises(ValueError, match="max_tokens must be 1 for an embedding, got 16"):
        SamplingParams(embeds=True)
