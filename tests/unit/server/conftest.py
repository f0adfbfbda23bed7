"""An HTTP server in front of a fake coordinator, and clients of it."""

from __future__ import annotations

import httpx
import openai
import openai.types
import openai.types.chat
import pytest
from fake_coordinator import start_fake_coordinator
from http_server import TEXT, serving

from fastserve_mega.client.testing import WAIT_S, answer
from fastserve_mega.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir):
    return Tokenizer(tiny_tokenizer_dir)


@pytest.fixture(scope="module")
def shared(tokenizer):
    """One coordinator and one server for all tests of a file: starting them takes long."""
    coordinator = start_fake_coordinator()
    with serving(coordinator, tokenizer) as url:
        yield coordinator, url
    coordinator.close()


@pytest.fixture
def fake_coordinator(shared):
    shared[0].reset()
    return shared[0]


@pytest.fixture
def url(shared, fake_coordinator):
    return shared[1]


@pytest.fixture
def api(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=WAIT_S) as api:
        yield api


@pytest.fixture
def http(url):
    with httpx.Client(base_url=url, timeout=WAIT_S) as http:
        yield http


@pytest.fixture
def says_text(fake_coordinator, tokenizer):
    """The answer to every request is TEXT and the end-of-sequence token; returns its length."""
    ids = [*tokenizer.encode(TEXT), 2]
    fake_coordinator.behaviour = answer(ids)
    return len(ids)
