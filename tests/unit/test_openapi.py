"""The OpenAPI document tells what is so, and its page needs nothing from elsewhere."""

from __future__ import annotations

import importlib.util
import re

import httpx
import pytest
from fake_coordinator import start_fake_coordinator
from http_server import serving

from fastserve_mega.client.testing import WAIT_S
from fastserve_mega.server import openapi
from fastserve_mega.text.tokenizer import Tokenizer

HI = [{"role": "user", "content": "hi"}]
ANSWERS = [
    ("/v1/completions", {"prompt": "x"}, openapi.Completion),
    ("/v1/completions", {"prompt": "x", "logprobs": 1, "echo": True}, openapi.Completion),
    ("/v1/embeddings", {"input": "x"}, openapi.EmbeddingList),
    ("/v1/chat/completions", {"messages": HI}, openapi.ChatCompletion),
    ("/v1/responses", {"input": "x"}, openapi.Response),
    ("/v1/messages", {"messages": HI, "max_tokens": 9}, openapi.Message),
]


@pytest.fixture(scope="module")
def server(tiny_tokenizer_dir):
    coordinator = start_fake_coordinator()
    with (
        serving(coordinator, Tokenizer(tiny_tokenizer_dir)) as url,
        httpx.Client(base_url=url, timeout=WAIT_S) as http,
    ):
        yield coordinator, http
    coordinator.close()


@pytest.fixture
def http(server):
    server[0].reset()
    return server[1]


@pytest.fixture
def document(http):
    return http.get("/openapi.json").json()


def schema_of(document, path, status):
    content = document["paths"][path]["post"]["responses"][status]["content"]
    return content["application/json"]["schema"]["$ref"].rpartition("/")[2]


@pytest.mark.parametrize(("path", "body", "model"), ANSWERS)
def test_answers_are_as_documented(http, document, path, body, model):
    response = http.post(path, json=body)
    assert response.status_code == 200
    model.model_validate(response.json())
    assert schema_of(document, path, "200") == model.__name__


def test_wrong_requests_are_answered_as_documented(http, document):
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"]
            assert "4XX" in operation["responses"], path
    openapi.Error.model_validate(http.post("/v1/completions", json={}).json())
    openapi.AnthropicError.model_validate(http.post("/v1/messages", json={}).json())
    assert schema_of(document, "/v1/completions", "400") == "Error"
    assert schema_of(document, "/v1/messages", "400") == "AnthropicError"


def test_the_page_needs_nothing_from_elsewhere(http):
    pytest.importorskip("fastapi_swagger", reason="needs pip install fastapi-swagger")
    page = http.get("/docs").text
    links = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(links) >= 2
    for link in links:
        assert link.startswith((str(http.base_url), "/"))
        assert http.get(link).status_code == 200


def test_without_the_package_the_page_says_so(tiny_tokenizer_dir, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    coordinator = start_fake_coordinator()
    with serving(coordinator, Tokenizer(tiny_tokenizer_dir)) as url:
        response = httpx.get(f"{url}/docs", timeout=WAIT_S)
    assert response.status_code == 404
    assert "pip install fastapi-swagger" in response.json()["error"]["message"]
    coordinator.close()


def test_alive_and_ready_are_two_things(tiny_tokenizer_dir):
    coordinator = start_fake_coordinator()
    with (
        serving(coordinator, Tokenizer(tiny_tokenizer_dir), patience_s=0.9) as url,
        httpx.Client(base_url=url, timeout=WAIT_S) as http,
    ):
        names = ("/health/live", "/health/ready", "/health")
        assert [http.get(name).status_code for name in names] == [200, 200, 200]
        coordinator.silent = True
        assert [http.get(name).status_code for name in names] == [200, 503, 503]
    coordinator.close()
