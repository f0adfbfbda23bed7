"""The HTTP application in front of a whole server without a model."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

import httpx
import pytest
from fake_server import WAIT_MS, GatedRunner, expected_tokens

from fastserve_mega.client import AsyncClient
from fastserve_mega.server.app import create_app
from fastserve_mega.text.tokenizer import Tokenizer
from fastserve_mega.worker.model_runner import StepOutput

WAIT_S = WAIT_MS / 1000
TEXT = "naïve 日本語 🙂🙃 fox 🙂"


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir):
    return Tokenizer(tiny_tokenizer_dir)


@asynccontextmanager
async def open_api(server, tokenizer):
    """The application in this very event loop: what blocks it blocks the test."""
    async with AsyncClient(server.endpoint, tokenizer) as client:
        transport = httpx.ASGITransport(create_app(client, tokenizer))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            yield http


def test_a_step_does_not_block_the_event_loop(start_server, tokenizer):
    """All this happens while one step, which the test holds back, is being executed."""

    async def main(server):
        async with open_api(server, tokenizer) as http:
            server.runner.entered.clear()
            server.runner.open_gate.clear()
            body = {"prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0.0}
            first = asyncio.create_task(http.post("/v1/completions", json=body))
            assert await asyncio.to_thread(server.runner.entered.wait, WAIT_S)
            for path in ("/health", "/metrics", "/v1/models"):
                assert (await http.get(path)).status_code == 200
            second = asyncio.create_task(http.post("/v1/completions", json=body))
            refused = await http.post("/v1/completions", json={**body, "top_p": -1})
            assert refused.status_code == 400
            assert not server.runner.open_gate.is_set()
            assert not first.done()
            server.runner.open_gate.set()
            return await first, await second

    with start_server() as server:
        answers = asyncio.run(asyncio.wait_for(main(server), 2 * WAIT_S))
    text = tokenizer.decode(expected_tokens((5, 6, 7), 4))
    assert [answer.json()["choices"][0]["text"] for answer in answers] == [text, text]


class Reciter(GatedRunner):
    """Says TEXT, token by token, whatever it is asked."""

    token_ids: tuple[int, ...] = (1,)

    def execute(self, batch):
        super().execute(batch)
        sampling = [sequence for sequence in batch if sequence.samples]
        said = [sequence.context - sequence.prompt_tokens for sequence in sampling]
        return StepOutput([self.token_ids[n % len(self.token_ids)] for n in said])


def streamed_texts(server, tokenizer, body):
    async def main():
        async with open_api(server, tokenizer) as http:
            return (await http.post("/v1/completions", json={**body, "stream": True})).text

    stream = asyncio.run(asyncio.wait_for(main(), WAIT_S))
    events = [event.removeprefix("data: ") for event in stream.split("\n\n") if event]
    assert events.pop() == "[DONE]"
    return [json.loads(event)["choices"][0]["text"] for event in events]


def test_a_stream_sends_what_is_new_and_whole_characters_only(start_server, tokenizer):
    ids = tuple(tokenizer.encode(TEXT))
    assert any("\ufffd" in tokenizer.decode([token]) for token in ids)  # parts of characters
    with start_server(make_runner=Reciter) as server:
        server.runner.token_ids = ids
        body = {"prompt": "x", "max_tokens": len(ids)}
        texts = streamed_texts(server, tokenizer, body)
    assert "".join(texts) == TEXT
    assert not any("\ufffd" in text for text in texts)
    assert len([text for text in texts if text]) > 5


def test_a_stream_cuts_no_character_for_any_bytes(start_server, tokenizer):
    """The fake runner's tokens are bytes at random."""
    with start_server() as server:
        body = {"prompt": [5, 6, 7], "max_tokens": 100, "temperature": 0.0}
        texts = streamed_texts(server, tokenizer, body)
    assert "".join(texts) == tokenizer.decode(expected_tokens((5, 6, 7), 100))


def test_several_answers_share_the_prompt(start_server, tokenizer):
    """The first computes it; the others find it in the prefix cache."""

    async def main(server):
        async with open_api(server, tokenizer) as http:
            body = {"prompt": list(range(5, 46)), "max_tokens": 3, "n": 4, "temperature": 0.0}
            answer = (await http.post("/v1/completions", json=body)).json()
            return answer, (await http.get("/metrics")).text

    with start_server(block_size=4) as server:
        answer, metrics = asyncio.run(asyncio.wait_for(main(server), WAIT_S))
    text = tokenizer.decode(expected_tokens(range(5, 46), 3))
    assert [choice["text"] for choice in answer["choices"]] == [text] * 4
    assert answer["usage"]["prompt_tokens"] == 41
    found = metrics.split("\nfastserve_prefix_cache_hit_tokens_total ")[1].split()[0]
    assert float(found) == 3 * 40
