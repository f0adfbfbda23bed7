"""Structured output from the official client to the rank that samples, at random otherwise."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import openai
import pytest
from fake_server import VOCAB, WAIT_MS, fake_server
from http_server import serving
from pydantic import BaseModel
from test_sampling_options import EOS, SamplingRunner

pytest.importorskip("llguidance")

from fastserve_mega.client import Client, InvalidRequestError
from fastserve_mega.text.tokenizer import Tokenizer
from fastserve_mega.types import SamplingParams, StructuredOutput
from fastserve_mega.worker.grammar import Grammars

WAIT_S = WAIT_MS / 1000
HI = [{"role": "user", "content": "hi"}]


class Animal(BaseModel):
    """What the answers are."""

    kind: Literal["fox", "dog", "日本"]
    legs: Literal[2, 4]


@pytest.fixture(scope="module")
def server(model_directory):
    with fake_server(model_directory, make_runner=SamplingRunner, ranks=2) as server:
        server.runner.grammars = Grammars(model_directory, VOCAB, (EOS,))
        yield server


@pytest.fixture(scope="module")
def url(server, model_directory):
    with serving(server, Tokenizer(model_directory)) as url:
        yield f"{url}/v1"


@pytest.fixture
def api(url):
    with openai.OpenAI(base_url=url, api_key="x", max_retries=0, timeout=WAIT_S) as api:
        yield api


def test_the_official_client_parses_what_it_asked_for(api):
    def ask(seed):
        done = api.chat.completions.parse(
            model="fake-model0", messages=HI, response_format=Animal, seed=seed, max_tokens=100
        )
        return done.choices[0].message.parsed

    with ThreadPoolExecutor(4) as pool:
        animals = list(pool.map(ask, range(12)))
    assert all(isinstance(animal, Animal) for animal in animals)
    assert len({animal.kind for animal in animals}) == 3
    assert ask(5) == animals[5]


def test_asynchronously_and_streamed(url):
    async def main():
        async with openai.AsyncOpenAI(base_url=url, api_key="x", timeout=WAIT_S) as api:
            stream = await api.completions.create(
                model="fake-model0", prompt="x", stream=True, max_tokens=60, n=2, seed=1,
                extra_body={"guided_regex": "[a-f]{4}-[0-9]{2}"},
            )  # fmt: skip
            texts = ["", ""]
            async for chunk in stream:
                texts[chunk.choices[0].index] += chunk.choices[0].text
            return texts

    first, second = asyncio.run(asyncio.wait_for(main(), WAIT_S))
    assert first != second
    for text in (first, second):
        assert len(text) == 7
        assert set(text[:4]) <= set("abcdef")
        assert text[4] == "-"
        assert text[5:].isdigit()


def test_a_grammar_that_only_the_rank_finds_bad_ends_its_request_alone(server):
    """The client has not looked at it: the API server would have."""
    bad = StructuredOutput(regex="([")
    with Client(server.endpoint) as client:
        good = client.submit((5, 6), SamplingParams(max_tokens=30, ignore_eos=True))
        refused = client.submit((5, 6), SamplingParams(structured=bad))
        with pytest.raises(InvalidRequestError, match="unclosed character class"):
            refused.wait()
        assert len(good.wait().token_ids) == 30
        choice = StructuredOutput(choice=("fox",))
        assert client.submit((5, 6), SamplingParams(structured=choice)).wait().text == "fox"


def test_a_resumed_answer_goes_on_in_its_grammar(server, model_directory, raw_client):
    from fastserve_mega.messaging.messages import Finished, Submit

    schema = StructuredOutput(json_schema=json.dumps(Animal.model_json_schema()))
    params = SamplingParams(structured=schema, seed=3, max_tokens=100)
    client = raw_client(server)

    def tokens_of(request_id, received=()):
        client.send(Submit(request_id, (7, 8, 9), params, received))
        *messages, _ = client.receive_until(Finished)
        return tuple(token for message in messages for token in message.token_ids)

    whole = tokens_of("whole")
    Animal.model_validate_json(Tokenizer(model_directory).decode(whole[:-1]))
    for held in (1, len(whole) // 2, len(whole) - 1):
        assert tokens_of(f"from {held}", whole[:held]) == whole[held:]
