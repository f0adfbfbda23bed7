"""Keys, request ids, origins, and the endpoints that turn text into tokens."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import httpx
import pytest

from fastserve_mega.client import AsyncClient
from fastserve_mega.server.api_keys import ApiKeys
from fastserve_mega.server.app import create_app
from fastserve_mega.system.api_keys import hash_secret
from fastserve_mega.text.tokenizer import Tokenizer

TEXT = "the quick brown fox"
BODY = {"prompt": [5, 6, 7], "max_tokens": 2}


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir):
    return Tokenizer(tiny_tokenizer_dir)


@pytest.fixture
def ask(start_server, tokenizer):
    """Send requests one after another to an application with some options; the responses."""

    @asynccontextmanager
    async def api(server, options):
        async with AsyncClient(server.endpoint, tokenizer) as client:
            transport = httpx.ASGITransport(create_app(client, tokenizer, **options))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
                yield http

    def send(*requests, **options):
        async def main(server):
            async with api(server, options) as http:
                return [await http.request(*request[:2], **request[2]) for request in requests]

        with start_server() as server:
            return asyncio.run(main(server))

    return send


@pytest.fixture
def api_keys(tmp_path):
    """The keys of secrets, each with limits."""

    def make(**limits):
        lines = ["keys:"]
        for secret, more in limits.items():
            lines.append(f"  - {{name: of-{secret}, sha256: {hash_secret(secret)}{more}}}")
        path = tmp_path / "keys.yaml"
        path.write_text("\n".join(lines))
        return ApiKeys(path)

    return make


def bearer(key):
    return {"headers": {"Authorization": f"Bearer {key}"}}


def test_without_keys_everybody_may_ask(ask):
    (answer,) = ask(("POST", "/v1/completions", {"json": BODY}))
    assert answer.status_code == 200


def test_a_key_is_required_where_something_is_computed(ask, api_keys):
    paths = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]
    answers = ask(
        *(("POST", path, {"json": BODY}) for path in paths),
        ("GET", "/v1/models", {}),
        ("GET", "/v1/models", bearer("wrong")),
        ("GET", "/v1/models", {"headers": {"Authorization": "Basic second"}}),
        ("GET", "/v1/models", bearer("second")),
        ("POST", "/v1/completions", {"json": BODY, **bearer("first")}),
        ("GET", "/health", {}),
        ("GET", "/metrics", {}),
        api_keys=api_keys(first="", second=""),
    )
    statuses = [answer.status_code for answer in answers]
    assert statuses == [401] * 7 + [200] * 4
    assert answers[0].json()["error"]["code"] == "invalid_api_key"
    assert answers[0].headers["WWW-Authenticate"] == "Bearer"


def test_the_limits_of_a_key_are_told_with_429_and_its_use_in_the_metrics(ask, api_keys):
    post = ("POST", "/v1/completions", {"json": BODY, **bearer("few")})
    streamed = ("POST", "/v1/completions", {"json": {**BODY, "stream": True}, **bearer("few")})
    urgent = ("POST", "/v1/completions", {"json": {**BODY, "priority": 1}, **bearer("few")})
    many = ("POST", "/v1/completions", {"json": {**BODY, "n": 3}, **bearer("few")})
    short = ("POST", "/v1/completions", {"json": BODY, **bearer("short")})
    keys = api_keys(
        few=", requests_per_minute: 2, concurrency: 2, most_urgent_priority: 2",
        short=", tokens_per_minute: 4",
    )
    answers = ask(post, urgent, many, streamed, post, short, short, ("GET", "/metrics", {}),
                  api_keys=keys)  # fmt: skip
    assert [each.status_code for each in answers] == [200, 403, 400, 200, 429, 200, 429, 200]
    told = [each.json()["error"]["message"] for each in answers if each.status_code >= 400]
    assert told == [
        "priority must be at least 2 with the key 'of-few', got 1",
        "the key 'of-few' has a limit of 2 (concurrency): 3 answers at once",
        "the key 'of-few' has a limit of 2 (requests_per_minute): one request more",
        "the key 'of-short' has a limit of 4 (tokens_per_minute): the tokens are used up",
    ]
    assert 0 < int(answers[4].headers["Retry-After"]) <= 30
    assert 0 < int(answers[6].headers["Retry-After"]) <= 30
    metrics = answers[7].text
    assert 'fastserve_key_requests_total{key="of-few"} 2.0' in metrics
    assert 'fastserve_key_prompt_tokens_total{key="of-few"} 6.0' in metrics
    assert 'fastserve_key_generation_tokens_total{key="of-few"} 4.0' in metrics
    assert 'fastserve_key_unfinished_answers{key="of-few"} 0.0' in metrics
    assert 'fastserve_key_refused_total{key="of-short",limit="tokens_per_minute"} 1.0' in metrics


@pytest.mark.parametrize(
    ("given", "kept"), [("my-id-1", True), ("x" * 129, False), ("", False), ("a\tb", False)]
)
def test_every_answer_has_a_request_id(ask, given, kept):
    headers = {"headers": {"X-Request-Id": given}}
    for answer in ask(("GET", "/v1/models", headers), ("GET", "/nowhere", headers)):
        request_id = answer.headers["X-Request-Id"]
        assert (request_id == given) is kept
        assert len(request_id) >= 7


def test_other_origins_may_ask_only_when_configured(ask, api_keys):
    headers = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    preflight = ("OPTIONS", "/v1/completions", {"headers": headers})
    (refused,) = ask(preflight)
    assert "access-control-allow-origin" not in refused.headers
    models = ("GET", "/v1/models", {"headers": headers})
    allowed, answer = ask(
        preflight, models, cors_origins=("https://app.example",), api_keys=api_keys(key="")
    )
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    # The page may read what clients wait by.
    assert answer.headers["access-control-expose-headers"] == "X-Request-Id, Retry-After"


def test_text_to_tokens_and_back(ask, tokenizer):
    tokens = tokenizer.encode(TEXT)
    messages = [{"role": "user", "content": TEXT}]
    there, back, chat, both, bad = ask(
        ("POST", "/tokenize", {"json": {"prompt": TEXT}}),
        ("POST", "/detokenize", {"json": {"tokens": tokens}}),
        ("POST", "/tokenize", {"json": {"messages": messages}}),
        ("POST", "/tokenize", {"json": {"prompt": TEXT, "messages": messages}}),
        ("POST", "/detokenize", {"json": {"tokens": [100_000]}}),
    )
    assert there.json() == {"tokens": tokens, "count": len(tokens), "max_model_len": 512}
    assert back.json() == {"prompt": TEXT}
    assert chat.json()["tokens"] == tokenizer.apply_chat_template(messages)
    assert both.status_code == bad.status_code == 400
    assert "100000 is not in the vocabulary" in bad.json()["error"]["message"]


def test_the_version_is_told(ask):
    (answer,) = ask(("GET", "/version", {}))
    assert answer.json()["version"]
