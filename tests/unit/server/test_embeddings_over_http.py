"""POST /v1/embeddings, as the official client sees it."""

from __future__ import annotations

import httpx
import openai
import pytest

from fastserve_mega.client.testing import WAIT_S
from fastserve_mega.messaging.messages import Submit
from fastserve_mega.server.protocol import MAX_ANSWERS

VECTOR = pytest.approx([0.6, 0.0, -0.8])
"""What the fake coordinator answers."""


@pytest.fixture
def api(api):
    return api.embeddings


@pytest.mark.parametrize("encoding", ["float", "base64", openai.omit])
def test_texts_become_vectors_in_their_order(api, fake_coordinator, tokenizer, encoding):
    texts = ["fox", "a longer text"]
    prompts = [tuple(tokenizer.encode(text)) for text in texts]
    told = api.create(model="tiny", input=texts, encoding_format=encoding)
    assert [each.index for each in told.data] == [0, 1]
    if encoding == "base64":
        assert told.data[0].embedding == "mpkZPwAAAADNzEy/"
    else:
        assert [each.embedding for each in told.data] == [VECTOR, VECTOR]
    assert told.model == "tiny"
    assert told.usage.prompt_tokens == told.usage.total_tokens == sum(map(len, prompts))
    submits = fake_coordinator.received(Submit)
    assert [submit.prompt for submit in submits] == prompts
    assert {submit.params.max_tokens for submit in submits} == {1}


@pytest.mark.parametrize("ids", [[5, 6], [[5, 6], [7]]])
def test_token_ids_become_vectors(api, fake_coordinator, ids):
    told = api.create(model="tiny", input=ids, user="me", extra_body={"priority": 3})
    assert all(each.embedding == VECTOR for each in told.data)
    expected = [(5, 6), (7,)][: len(told.data)]
    submits = fake_coordinator.received(Submit)
    assert [submit.prompt for submit in submits] == expected
    assert {(submit.client, submit.priority) for submit in submits} == {("user:me", 3)}


@pytest.mark.parametrize(("kept", "expected"), [(2, (8, 9)), (-1, (5, 6, 7, 8, 9))])
def test_of_a_long_prompt_the_end_can_be_taken(api, fake_coordinator, kept, expected):
    prompt = [4] * (256 - 1 - 5) + [5, 6, 7, 8, 9]
    told = api.create(model="tiny", input=prompt, extra_body={"truncate_prompt_tokens": kept})
    (submit,) = fake_coordinator.received(Submit)
    assert submit.prompt[-5:] == expected[-5:]
    assert told.usage.prompt_tokens == len(submit.prompt) == (2 if kept == 2 else 255)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"input": "x", "dimensions": 3}, "dimensions=3 is not supported"),
        ({"input": []}, "the prompt is empty"),
        ({"input": [[]]}, "the prompt is empty"),
        ({"input": [1, 400]}, "token id 400 is not in the vocabulary of 400"),
        ({"input": [1] * 256}, "the context is 256 tokens for prompt and answer together"),
        ({"input": "x" * 1_000_000}, "the prompt has 1000000 characters"),
        ({"input": ["x"] * (MAX_ANSWERS + 1)}, "at most 1024 answers"),
        ({"input": "x", "temperature": 0.5}, "temperature"),
        ({"input": "x", "encoding_format": "int8"}, "'float' or 'base64'"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_sent(
    url, fake_coordinator, body, sentence
):
    response = httpx.post(f"{url}/v1/embeddings", json=body, timeout=WAIT_S)
    assert response.status_code == 400
    error = response.json()["error"]
    assert sentence in error["message"]
    assert error["param"] in (None, *body)
    assert fake_coordinator.received(Submit) == []


def test_an_unknown_model_is_refused(api):
    with pytest.raises(openai.NotFoundError, match="the served model is 'tiny'"):
        api.create(model="text-embedding-3-small", input="x")
