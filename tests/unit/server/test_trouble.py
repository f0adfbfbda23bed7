"""A coordinator that is full, fails or is gone, and clients that go away."""

from __future__ import annotations

import asyncio

import httpx
import openai
import openai.types
import openai.types.chat
import pytest
from fake_coordinator import start_fake_coordinator
from http_server import hi, serving

from fastserve_mega.client.testing import WAIT_S, begin, end
from fastserve_mega.messaging.messages import Cancel, Submit, Tokens
from fastserve_mega.types import FinishReason


@pytest.mark.parametrize(("retry_after_s", "told"), [(None, "1"), (0.2, "1"), (74.2, "75")])
@pytest.mark.parametrize("stream", [False, True])
def test_a_full_server_is_429_with_retry_after(api, fake_coordinator, stream, retry_after_s, told):
    fake_coordinator.behaviour = end(
        FinishReason.REJECTED, "1000 requests are queued", retry_after_s
    )
    with pytest.raises(openai.RateLimitError, match="1000 requests") as caught:
        api.completions.create(model="tiny", prompt="x", stream=stream)
    assert caught.value.response.headers["retry-after"] == told


@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_server_is_500(api, fake_coordinator, stream):
    fake_coordinator.behaviour = end(FinishReason.ERROR, "rank 3 is lost")
    with pytest.raises(openai.InternalServerError, match="rank 3"):
        api.chat.completions.create(model="tiny", messages=hi(), stream=stream)


def test_an_error_in_the_middle_of_a_stream_is_an_event(api, fake_coordinator):
    fake_coordinator.behaviour = lambda submit: [
        Tokens(submit.request_id, 0, (40,)),
        *end(FinishReason.ERROR, "rank 3 is lost")(submit),
    ]
    with pytest.raises(openai.APIError, match="rank 3"):
        list(api.completions.create(model="tiny", prompt="x", stream=True))


def test_health_and_metrics(http, fake_coordinator):
    assert http.get("/health").status_code == 200
    metrics = http.get("/metrics")
    assert metrics.text == "fake_requests_total 1\n"
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")


def test_a_coordinator_that_is_gone_is_503(tokenizer):
    coordinator = start_fake_coordinator()
    coordinator.silent = True
    with (
        serving(coordinator, tokenizer, patience_s=1.5) as url,
        httpx.Client(base_url=url, timeout=WAIT_S) as http,
    ):

        def complete():
            response = http.post("/v1/completions", json={"prompt": "x"})
            return response.status_code, response.json()["error"]["message"]

        assert complete()[0] == http.get("/metrics").status_code == 503
        coordinator.silent = False
        assert http.get("/v1/models").status_code == 200
        coordinator.silent = True
        assert http.get("/health").status_code == 503
        status, message = complete()
        assert status == 503
        assert "has not answered for 1.5 s" in message
        coordinator.silent = False
        assert http.get("/health").status_code == 200
    coordinator.close()


def test_a_client_that_goes_away_in_the_middle_cancels_its_request(api, fake_coordinator):
    fake_coordinator.behaviour = begin([40, 41])
    stream = api.completions.create(model="tiny", prompt="x", stream=True)
    next(iter(stream))
    stream.close()
    fake_coordinator.wait_for(Cancel)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_before_the_first_token_as_well(url, fake_coordinator, stream):
    fake_coordinator.behaviour = begin([])

    async def main():
        async with httpx.AsyncClient(base_url=url) as http:
            body = {"prompt": "x", "stream": stream}
            post = asyncio.create_task(http.post("/v1/completions", json=body))
            await asyncio.to_thread(fake_coordinator.wait_for, Submit)
            post.cancel()
            await asyncio.gather(post, return_exceptions=True)

    asyncio.run(asyncio.wait_for(main(), WAIT_S))
    fake_coordinator.wait_for(Cancel)
