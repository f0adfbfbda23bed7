"""A request that is sent again with its `Idempotency-Key` gets the answer of the first one."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from fake_server import WAIT_MS, expected_tokens

from fastserve_mega.client import AsyncClient, Client, RequestIdInUseError, SentAgainError
from fastserve_mega.messaging.messages import Cancel, Finished, Submit, Tokens
from fastserve_mega.server.app import create_app
from fastserve_mega.server.errors import from_client_error
from fastserve_mega.text.tokenizer import Tokenizer
from fastserve_mega.types import FinishReason, SamplingParams

WAIT_S = WAIT_MS / 1000
COUNT = 40
BODY = {"prompt": [1, 2, 3], "max_tokens": COUNT, "ignore_eos": True}
PARAMS = SamplingParams(max_tokens=COUNT, temperature=0.0, ignore_eos=True)
KEYED = {"request_id": "order-17", "fingerprint": "v1"}


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir):
    return Tokenizer(tiny_tokenizer_dir)


def with_api(server, tokenizer, scenario):
    """Run a scenario with a function that opens one HTTP server after another."""

    def open_api():
        client = AsyncClient(server.endpoint, tokenizer)
        app = httpx.ASGITransport(create_app(client, tokenizer))
        return client, httpx.AsyncClient(transport=app, base_url="http://test", timeout=WAIT_S)

    return asyncio.run(asyncio.wait_for(scenario(open_api), 2 * WAIT_S))


def key(text: str, user: str = "") -> dict[str, str]:
    return {"Idempotency-Key": text} | ({"Authorization": f"Bearer {user}"} if user else {})


def test_a_finished_answer_is_given_again_by_another_http_server(start_server, tokenizer):
    async def scenario(open_api):
        answers = []
        for _ in range(2):
            client, http = open_api()
            async with client, http:
                url = "/v1/completions"
                # Sampled, and without a seed: only the first answer itself is the same.
                answers.append(await http.post(url, json={**BODY, "seed": None}, headers=key("a")))
        return answers

    with start_server() as server:
        first, second = with_api(server, tokenizer, scenario)
        assert server.runner.steps < 2 * COUNT
    assert first.status_code == second.status_code == 200
    for field in ("choices", "usage"):
        assert first.json()[field] == second.json()[field]


def test_a_key_with_another_body_is_refused_and_is_not_another_users(start_server, tokenizer):
    async def scenario(open_api):
        client, http = open_api()
        async with client, http:
            post = http.post
            assert (await post("/v1/completions", json=BODY, headers=key("a"))).status_code == 200
            other = {**BODY, "prompt": [9]}
            chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
            return (
                await post("/v1/completions", json=other, headers=key("a")),
                await post("/v1/completions", json=other, headers=key("a", "somebody")),
                await post("/v1/completions", json=other, headers=key("a") | {"X-Api-Key": "she"}),
                await post("/v1/chat/completions", json=chat, headers=key("a")),
                await post("/v1/completions", json=other, headers=key("a" * 256)),
            )

    with start_server() as server:
        refused, others, hers, chat, too_long = with_api(server, tokenizer, scenario)
    assert others.status_code == hers.status_code == 200
    for answer in (refused, chat):
        assert answer.status_code == 422
        assert "used for another request" in answer.json()["error"]["message"]
    assert too_long.status_code == 400
    assert "1 to 255" in too_long.json()["error"]["message"]


def test_a_stream_begins_anew_where_another_http_server_was_lost(start_server, tokenizer):
    """The first one is never told to cancel: it has vanished, with its streams."""

    async def scenario(open_api):
        (_, lost), (client, http) = open_api(), open_api()
        body = {**BODY, "stream": True, "temperature": 0}
        async with client, http, lost:
            request = lost.post("/v1/completions", json=body, headers=key("s"))
            first = asyncio.create_task(request)
            assert await asyncio.to_thread(server.runner.entered.wait, WAIT_S)
            second = asyncio.create_task(http.post("/v1/completions", json=body, headers=key("s")))
            await asyncio.sleep(0)
            answer = await second
            first.cancel()
            return answer

    with start_server() as server:
        server.runner.entered.clear()
        answer = with_api(server, tokenizer, scenario)
    *_, done = events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert done == "[DONE]"
    text = "".join(json.loads(each)["choices"][0]["text"] for each in events[:-1])
    assert text == tokenizer.decode(expected_tokens((1, 2, 3), COUNT))


# --- the same over ZeroMQ ------------------------------------------------------------------------


def test_what_was_cancelled_goes_on_without_being_computed_again(start_server, raw_client):
    with start_server() as server:
        client, another = raw_client(server), raw_client(server)
        submit = Submit("r", (1, 2), PARAMS, fingerprint="f")
        client.send(submit)
        assert isinstance(client.receive(), Tokens)
        client.send(Cancel("r"))
        *tokens, end = client.receive_until(Finished)
        assert end.reason is FinishReason.ABORT
        before = server.runner.steps
        another.send(submit)
        *again, end = another.receive_until(Finished)
    received = 1 + sum(len(message.token_ids) for message in tokens)
    assert len(again[0].token_ids) == received
    assert again[0].offset == 0
    everything = tuple(token for message in again for token in message.token_ids)
    assert everything == expected_tokens((1, 2), COUNT)
    assert end.reason is FinishReason.LENGTH
    # One step computes the KV again, and each other one a token.
    assert server.runner.steps - before <= COUNT - received + 1


def test_the_same_request_of_the_same_client_takes_the_place_of_the_first(start_server):
    with start_server() as server, Client(server.endpoint) as client:
        first = client.submit([1, 2], PARAMS, **KEYED)
        next(iter(first))
        server.runner.open_gate.clear()
        second = client.submit([1, 2], PARAMS, **KEYED)
        with pytest.raises(SentAgainError) as caught:
            first.wait()
        assert from_client_error(caught.value).status == 409
        with pytest.raises(RequestIdInUseError):
            client.submit([1, 3], PARAMS, **KEYED)
        server.runner.open_gate.set()
        assert second.wait().token_ids == expected_tokens([1, 2], COUNT)


def test_an_id_of_another_finished_request_is_refused(start_server):
    with start_server() as server, Client(server.endpoint) as client:
        client.submit([1, 2], PARAMS, **KEYED).wait()
        with pytest.raises(RequestIdInUseError, match="order-17"):
            client.submit([1, 2], PARAMS, request_id="order-17", fingerprint="v2").wait()
        assert client.submit([1, 2], PARAMS, **KEYED).wait().usage.completion_tokens == COUNT
