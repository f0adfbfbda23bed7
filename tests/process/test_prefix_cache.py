"""The prefix cache through the whole server: what is shared, what is not, and that it is right.

The pools of the fake ranks hold token ids, so a wrongly shared block changes the answer.
"""

import pytest
from fake_server import VOCAB, GatedRunner, expected_tokens

from fastserve_mega.client import Client
from fastserve_mega.system.config import SwapConfig
from fastserve_mega.types import SamplingParams

SYSTEM_PROMPT = [1 + (7 * i) % (VOCAB - 1) for i in range(30)]  # 7 blocks of 4, and 2 tokens
HIT = 28
PROACTIVE = SwapConfig(strategy="proactive", write_through_blocks=3, write_through_occupancy=0.3)


def ask(client, prompt, count=8, **options):
    params = SamplingParams(max_tokens=count, temperature=0.0)
    return client.submit(prompt, params, **options)


def answer(client, prompt, count=8, **options):
    """Check the tokens; returns how many of the prompt were cached."""
    result = ask(client, prompt, count, **options).wait()
    assert result.token_ids == expected_tokens(prompt, count)
    return result.usage.cached_tokens


class CountingRunner(GatedRunner):
    """Counts the tokens that are computed, of which none are in vain."""

    computed = 0

    def __init__(self, **options) -> None:
        super().__init__(**{**options, "looks_ahead": False})

    def execute(self, batch):
        self.computed += sum(len(sequence.token_ids) for sequence in batch)
        return super().execute(batch)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_shared_system_prompt_is_prefilled_once(start_server, ranks):
    with start_server(ranks=ranks, make_runner=CountingRunner) as server:
        server.runner.computed = 0
        with Client(server.endpoint) as client:
            prompts = [[*SYSTEM_PROMPT, 100 + i, 101 + i] for i in range(6)]
            generations = [ask(client, prompt) for prompt in prompts]  # at once
            for prompt, generation in zip(prompts, generations, strict=True):
                assert generation.wait().token_ids == expected_tokens(prompt, 8)
            metrics = client.metrics()
        own_tokens = 6 * (len(prompts[0]) - HIT + 7)
        assert server.runner.computed == HIT + own_tokens
    assert "fastserve_prefix_cache_queried_tokens_total 192.0" in metrics
    assert f"fastserve_prefix_cache_hit_tokens_total {5 * HIT}.0" in metrics


def test_salts_keep_requests_apart(start_server):
    with start_server() as server, Client(server.endpoint) as client:
        assert answer(client, SYSTEM_PROMPT) == 0
        assert answer(client, SYSTEM_PROMPT) == HIT
        assert answer(client, SYSTEM_PROMPT, cache_salt="somebody else") == 0
        assert answer(client, SYSTEM_PROMPT, cache_salt="somebody else") == HIT


def test_at_least_one_token_is_computed(start_server):
    with start_server() as server, Client(server.endpoint) as client:
        assert answer(client, SYSTEM_PROMPT[:28]) == 0
        assert answer(client, SYSTEM_PROMPT[:28]) == 24


def test_the_next_turn_of_a_conversation_finds_the_answer(start_server):
    with start_server() as server, Client(server.endpoint) as client:
        assert answer(client, SYSTEM_PROMPT, 11) == 0
        turn = [*SYSTEM_PROMPT, *expected_tokens(SYSTEM_PROMPT, 11), 5, 6, 7]
        assert answer(client, turn) == 40  # of 41; the KV of the last token was not needed


def test_it_can_be_switched_off(start_server):
    with start_server(prefix_cache=False) as server, Client(server.endpoint) as client:
        assert answer(client, SYSTEM_PROMPT) == 0
        assert answer(client, SYSTEM_PROMPT) == 0


@pytest.mark.parametrize(("strategy", "hit"), [("proactive", HIT), ("recompute", 0)])
def test_the_oldest_moves_to_the_host_before_it_is_dropped(start_server, strategy, hit):
    swap = SwapConfig(strategy=strategy, write_through_blocks=8, write_through_occupancy=0.1)
    with (
        start_server(device_blocks=64, host_blocks=200, swap=swap) as server,
        Client(server.endpoint) as client,
    ):
        assert answer(client, SYSTEM_PROMPT) == 0
        for i in range(8):  # keep 14 blocks each
            answer(client, [2 + i, *range(1, 40)], 20)
        assert answer(client, SYSTEM_PROMPT) == hit


@pytest.mark.parametrize("host_blocks", [0, 8, 200])
@pytest.mark.parametrize("strategy", ["proactive", "reactive", "recompute", "none"])
def test_shared_blocks_survive_preemption(start_server, strategy, host_blocks):
    swap = SwapConfig(strategy=strategy, write_through_blocks=3, write_through_occupancy=0.3)
    with (
        start_server(
            device_blocks=32, host_blocks=host_blocks, swap=swap,
            max_batch_size=5, max_batch_tokens=16,
        ) as server,
        Client(server.endpoint) as client,
    ):  # fmt: skip
        prompts = [[*SYSTEM_PROMPT[: 5 * (i % 7)], *range(i + 1, 3 * i + 2)] for i in range(14)]
        generations = [ask(client, prompt, 5 + 2 * i) for i, prompt in enumerate(prompts)]
        for i, (prompt, generation) in enumerate(zip(prompts, generations, strict=True)):
            assert generation.wait().token_ids == expected_tokens(prompt, 5 + 2 * i)
        assert "fastserve_prefix_cache_hit_tokens_total 0.0" not in client.metrics()
