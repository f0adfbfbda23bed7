"""Each body that is wrong gets one sentence, and nothing reaches the coordinator."""

from __future__ import annotations

import json

import pytest
from http_server import hi

from fastserve_mega.messaging.messages import Submit
from fastserve_mega.server.middleware import body_limit

JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"prompt": "x", "bogus": 1}, "unknown field 'bogus'"),
        ({"prompt": "x", "logprobs": 21}, "logprobs: input should be less than or equal to 20"),
        ({"prompt": "x", "n": 0}, "n: input should be greater than or equal to 1"),
        ({"prompt": "x", "n": 2, "best_of": 3}, "best_of=3 is not supported unless it is n (2)"),
        ({"prompt": ["x"] * 9, "n": 128}, "at most 1024 answers, got 9 prompts with n=128"),
        ({"prompt": "x", "suffix": "y"}, "suffix='y' is not supported"),
        (
            {"prompt": "x", "presence_penalty": 3},
            "presence_penalty must be between -2 and 2, got 3",
        ),
        ({"prompt": "x", "stop_token_ids": [2**70]}, "a number in the request has more than 64"),
        ({"prompt": "x", "temperature": -1}, "temperature must be between 0 and 100, got -1"),
        ({"prompt": "x", "temperature": "hot"}, "temperature: input should be a valid number"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens must be at least 1, got 0; 0 is for echo"),
        ({"prompt": "x", "top_p": -0.1}, "top_p must be between 0 and 1"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options are for"),
        ({"prompt": "x", "seed": 2**63}, "seed must be between -9223372036854775808 and"),
        ({"prompt": ["a", 5]}, "prompt.1: input should be a valid string"),
        ({"prompt": "x", "stop": {"a": 1}}, "stop must be a string or a list of strings, got"),
        ({"prompt": "x", "guided_json": 5}, "guided_json: input should be a valid dictionary; or"),
        (
            {"prompt": "x", "response_format": {"type": "json_schema"}},
            "response_format.json_schema: field required",
        ),
        ({"prompt": "x", "stop": ["a", ""]}, "a stop string must not be empty"),
        ({"prompt": "x", "timeout": 0}, "timeout: input should be greater than 0"),
        ({"prompt": "x", "max_tokens": 999}, "the context is 256 tokens"),
        ({"prompt": [40] * 256}, "the prompt has 256 and max_tokens is at least 1"),
        ({"prompt": [40, 400]}, "token id 400 is not in the vocabulary of 400"),
        ({"prompt": [-1]}, "token id -1 is not in the vocabulary"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": {"a": 1}}, "prompt: input should be a valid string"),
        ({"prompt": "\ud800"}, "not valid Unicode"),
        ({}, "prompt: field required"),
    ],
)
def test_a_wrong_completion_request_gets_one_sentence(http, fake_coordinator, body, sentence):
    response = http.post("/v1/completions", content=json.dumps(body), headers=JSON)
    assert response.status_code == 400
    error = response.json()["error"]
    assert sentence in error["message"]
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}
    assert fake_coordinator.received(Submit) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("frequency_penalty", -2.5), ("min_p", 1.5), ("top_k", -3), ("seed", -(2**63) - 1),
     ("min_tokens", 99), ("repetition_penalty", 0.0), ("max_tokens", -1),
     ("logit_bias", {"1": 101}), ("stop_token_ids", [-1]), ("timeout", -1), ("n", 129),
     ("stop", [""]), ("echo", "yes"), ("best_of", 2), ("suffix", "x"), ("top_p", 1.1),
     ("stream_options", {})],
)  # fmt: skip
def test_the_error_about_a_value_names_its_field(http, name, value):
    response = http.post("/v1/completions", json={"prompt": "x", name: value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == name


@pytest.mark.parametrize(("seed", "sent"), [(-5, -5), (0, 0), (-(2**63), -(2**63)), (-1, None)])
def test_any_seed_of_64_bits_is_taken_and_minus_1_draws_one(api, fake_coordinator, seed, sent):
    api.completions.create(model="tiny", prompt="x", seed=seed)
    (submit,) = fake_coordinator.received(Submit)
    assert submit.params.seed == sent or (sent is None and submit.params.seed >= 0)


@pytest.mark.parametrize(
    ("content", "headers", "status", "sentence"),
    [
        (b'{"prompt": "caf\xe9"}', {}, 400, "the body is not valid UTF-8: "),
        (b"[" * 99_000, {}, 400, "the body is nested too deeply"),
        (b"\x1f\x8b", {"Content-Encoding": "gzip"}, 415, "Content-Encoding: gzip"),
        (b'{"prompt": "x"}', {"Content-Encoding": "identity"}, 200, ""),
    ],
)
def test_a_body_that_cannot_be_read_is_told_why(http, content, headers, status, sentence):
    response = http.post("/v1/completions", content=content, headers={**JSON, **headers})
    assert response.status_code == status
    assert sentence in response.text


@pytest.mark.parametrize("path", ["/", "/health", "/version", "/metrics", "/v1/models"])
def test_head_is_answered_as_get_without_the_body(http, path):
    head, get = http.head(path), http.get(path)
    assert (head.status_code, head.content) == (get.status_code, b"") == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"messages": []}, "messages: a conversation has 1 to 4096 messages, got 0"),
        ({"messages": hi(), "top_logprobs": 2}, "top_logprobs=2 needs logprobs=true"),
        ({"messages": hi("nobody")}, "messages.0.role: input should be 'system'"),
        (
            {"messages": hi("user"), "audio": {"voice": "x"}},
            "audio={'voice': 'x'} is not supported",
        ),
        (
            {"messages": hi(content=[{"type": "text", "text": "x"}, {"type": "image_url"}])},
            "messages.0.content.1: images are not supported: the served model reads text only",
        ),
        ({"messages": hi(content=5)}, "messages.0.content: input should be a valid string; or"),
        ({"messages": hi(content=[{"text": "x"}])}, "messages.0.content.0.type: field required"),
        ({"messages": hi(), "tool_choice": "any"}, "tool_choice: input should be 'none', 'auto'"),
        ({"messages": hi(), "max_tokens": 1, "max_completion_tokens": 2}, "are the same thing"),
        ({"messages": hi(content="fox " * 300)}, "the context is 256 tokens"),
        ({"messages": hi(), "max_completion_tokens": 250}, "max_tokens is 250"),
    ],
)
def test_a_wrong_chat_request_gets_one_sentence(http, fake_coordinator, body, sentence):
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert sentence in response.json()["error"]["message"]
    assert fake_coordinator.received(Submit) == []


def test_neutral_values_of_unsupported_fields_are_fine(http):
    neutral = {
        "n": 1,
        "logprobs": None,
        "best_of": 1,
        "echo": False,
        "logit_bias": {},
        "user": "me",
    }
    assert http.post("/v1/completions", json={"prompt": "x", **neutral}).status_code == 200
    neutral = {"n": 1, "logprobs": False, "tools": [], "response_format": {"type": "text"}}
    assert http.post("/v1/chat/completions", json={"messages": hi(), **neutral}).status_code == 200


def test_errors_outside_of_the_endpoints_have_the_same_shape(http):
    for response, status in [
        (http.post("/v1/completions", content=b"{", headers=JSON), 400),
        (http.post("/v1/completions", content=b"{}"), 400),
        (http.post("/v1/completions", content=b"3", headers=JSON), 400),
        (http.get("/v1/nothing"), 404),
        (http.get("/v1/completions"), 405),
        (http.post("/v1/completions", json={"prompt": "x", "model": "gpt-9"}), 404),
        (http.post("/v1/completions", content=b" " * (body_limit(0) + 1)), 413),
    ]:
        assert response.status_code == status
        assert response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "sentence"),
    [
        ("POST", "/v1/completions", 400, "the body must be a JSON object, sent with Content-Type"),
        ("POST", "/chat/completions", 404, "there is no /chat/completions here; the APIs' paths"),
        ("GET", "/v1/completions", 405, "/v1/completions is for POST, got GET"),
    ],
)
def test_what_asks_for_nothing_that_is_there_is_told_what_is(http, method, path, status, sentence):
    response = http.request(method, path)
    assert response.status_code == status
    assert sentence in response.json()["error"]["message"]
