"""What a body may cost before it is refused: counted, not timed."""

from __future__ import annotations

import asyncio
import threading

import httpx
import pytest
from fake_coordinator import start_fake_coordinator
from http_server import serving
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from fastserve_mega.client.testing import WAIT_S
from fastserve_mega.messaging.messages import Submit
from fastserve_mega.server.chat_protocol import MAX_MESSAGES, ChatRequest
from fastserve_mega.server.completions import CompletionRequest
from fastserve_mega.server.messages.protocol import MessagesRequest
from fastserve_mega.server.middleware import LimitBody, Turns
from fastserve_mega.server.protocol import MAX_ANSWERS
from fastserve_mega.server.responses.protocol import ResponsesRequest
from fastserve_mega.server.service import one_by_one
from fastserve_mega.server.tokens import DetokenizeRequest
from fastserve_mega.text.tokenizer import Tokenizer

MANY = 20_000
FIELDS = {f"field{number}": 1 for number in range(MANY)}
HI = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionRequest, {"prompt": [1] * MANY + [None]}),
        (CompletionRequest, {"prompt": [None] * MANY}),
        (CompletionRequest, {"prompt": [[None]] * MANY}),
        (CompletionRequest, {"prompt": "x", "stop_token_ids": [None] * 1000}),
        (CompletionRequest, {"prompt": "x", "guided_choice": [None] * MANY}),
        (CompletionRequest, {"prompt": "x", "structured_outputs": {"choice": [1] * MANY}}),
        (CompletionRequest, {"prompt": "x", "structured_outputs": FIELDS}),
        (CompletionRequest, {"prompt": "x", "metadata": FIELDS}),
        (CompletionRequest, {"prompt": "x", **FIELDS}),
        (ChatRequest, {"messages": [{}] * (MAX_MESSAGES - 1)}),
        (ChatRequest, {"messages": [HI | FIELDS]}),
        (ChatRequest, {"messages": [HI | {"content": [{}] * MANY}]}),
        (ChatRequest, {"messages": [HI | {"tool_calls": [{}] * MANY}]}),
        (ChatRequest, {"messages": [HI], "tools": [{}] * 100}),
        (DetokenizeRequest, {"tokens": [None] * MANY}),
        (ChatRequest, {"messages": [HI], "chat_template_kwargs": [1] * MANY}),
        (ResponsesRequest, {"input": [{}] * (MAX_MESSAGES - 1)}),
        (ResponsesRequest, {"input": [HI | {"content": [{}] * MANY}]}),
        (ResponsesRequest, {"input": "x", "tools": [{}] * 100}),
        (MessagesRequest, {"max_tokens": 1, "messages": [{}] * (MAX_MESSAGES - 1)}),
        (MessagesRequest, {"max_tokens": 1, "messages": [HI | {"content": [{}] * MANY}]}),
        (MessagesRequest, {"max_tokens": 1, "messages": [HI], "system": [{}] * MANY}),
        (MessagesRequest, {"max_tokens": 1, "messages": [HI], "stop_sequences": [1] * MANY}),
    ],
)
def test_a_wrong_body_is_refused_at_its_first_mistakes(kind, body):
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() < 10


class CountingTokenizer(Tokenizer):
    """Knows how often it was asked, and on which threads."""

    calls = 0
    threads = ()

    def encode(self, text, *, add_special_tokens=True):
        self.calls += 1
        self.threads += (threading.current_thread().name,)
        return super().encode(text, add_special_tokens=add_special_tokens)


@pytest.fixture(scope="module")
def server(tiny_tokenizer_dir):
    coordinator = start_fake_coordinator()
    tokenizer = CountingTokenizer(tiny_tokenizer_dir)
    with (
        serving(coordinator, tokenizer, max_body_bytes=2**20) as url,
        httpx.Client(base_url=url, timeout=WAIT_S) as http,
    ):
        yield coordinator, tokenizer, http
    coordinator.close()


@pytest.mark.parametrize(
    ("path", "body", "sentence"),
    [
        ("completions", {"prompt": ["x"] * (MAX_ANSWERS + 1)}, "at most 1024 prompts, got 1025"),
        ("completions", {"prompt": [[1]] * 40_000}, "at most 1024 prompts, got 40000"),
        ("completions", {"prompt": "x" * 200_000}, "the prompt has 200000 characters"),
        ("completions", {"prompt": [1] * 1000}, "the prompt has 1000 and max_tokens"),
        ("chat/completions", {"messages": [HI | {"content": "x" * 200_000}]}, "200000 characters"),
        ("chat/completions", {"messages": [HI] * (MAX_MESSAGES + 1)}, "4096 messages, got 4097"),
        (
            "chat/completions",
            {"messages": [HI | {"role": "assistant", "content": None}] * 4000},
            "characters; the context is",
        ),
        ("responses", {"input": [HI] * (MAX_MESSAGES + 1)}, "4096 items, got 4097"),
        ("responses", {"input": "x" * 200_000}, "200000 characters"),
        ("messages", {"messages": [HI] * (MAX_MESSAGES + 1), "max_tokens": 1}, "got 4097"),
    ],
)
def test_what_is_too_long_is_refused_before_it_is_tokenized(server, path, body, sentence):
    coordinator, tokenizer, http = server
    tokenizer.calls = 0
    coordinator.reset()
    response = http.post(f"/v1/{path}", json=body)
    assert response.status_code == 400
    assert sentence in response.json()["error"]["message"]
    assert (tokenizer.calls, coordinator.received(Submit)) == (0, [])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", {"prompt": "the quick brown fox " * 100}),
        ("chat/completions", {"messages": [HI | {"content": "the quick brown fox " * 100}]}),
        ("chat/completions", {"messages": [HI] * 10}),
    ],
)
def test_long_texts_are_tokenized_off_the_event_loop(server, path, body):
    _, tokenizer, http = server
    tokenizer.threads = ()
    http.post(f"/v1/{path}", json={**body, "max_tokens": 1})
    (thread,) = tokenizer.threads
    assert thread.startswith("asyncio")


def test_a_body_beyond_the_limit_is_refused(server):
    response = server[2].post("/v1/completions", content=iter([b" " * (2**20 + 1)]))  # in chunks
    assert response.status_code == 413
    assert "1048576 bytes (server.max_body_bytes)" in response.json()["error"]["message"]


def test_a_body_that_says_it_is_too_long_is_not_waited_for():
    async def read(scope, receive, send):
        await receive()

    async def receive():
        raise AssertionError("it is asked to go on")

    scope = {"type": "http", "headers": [(b"content-length", b"10")]}
    with pytest.raises(HTTPException, match="longer than 9 bytes"):
        asyncio.run(LimitBody(read, limit=9)(scope, receive, None))


@pytest.mark.parametrize("body", [{"prompt": "x", "k" * 100_000: 1}, {"model": "m" * 100_000}])
def test_an_error_does_not_say_again_all_that_was_sent(server, body):
    response = server[2].post("/v1/completions", json={"prompt": "x", **body})
    assert response.status_code in (400, 404)
    assert len(response.content) < 5_000


def test_a_number_too_long_is_told_in_its_own_words(server):
    body = b'{"prompt": "x", "max_tokens": ' + b"9" * 5_000 + b"}"
    response = server[2].post(
        "/v1/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400
    assert "more than 4300 digits" in response.json()["error"]["message"]


def turns_taken_during(work):
    """How often something else had its turn on the event loop while work was done."""

    async def count():
        turns, done = 0, asyncio.create_task(work())
        while not done.done():
            turns += 1
            await asyncio.sleep(0)
        await done
        return turns

    return asyncio.run(count())


def test_between_the_answers_of_a_request_others_have_their_turn():
    async def go():
        assert [pair async for pair in one_by_one("abc")] == [(0, "a"), (1, "b"), (2, "c")]

    assert turns_taken_during(go) >= 3


def test_of_many_bodies_that_are_complete_at_once_one_is_looked_at_in_a_turn():
    order = []

    async def go():
        turns = Turns()

        async def one(number):
            await turns.take()
            order.append(number)

        waiting = [asyncio.create_task(one(number)) for number in range(50)]
        await asyncio.sleep(0)
        waiting[7].cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    assert turns_taken_during(go) >= 49
    assert order == [number for number in range(50) if number != 7]
