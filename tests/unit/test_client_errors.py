"""What the asynchronous client raises, and when."""

from __future__ import annotations

import asyncio

import pytest
from asynchronous import collect, run, until

from fastserve_mega.client import (
    AsyncClient,
    InvalidRequestError,
    ServerBusyError,
    ServerError,
    ServerUnavailableError,
)
from fastserve_mega.client.testing import begin, end
from fastserve_mega.messaging.messages import Finished, Refused, Submit, Tokens
from fastserve_mega.text.tokenizer import Tokenizer
from fastserve_mega.types import FinishReason, SamplingParams, Usage


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir):
    return Tokenizer(tiny_tokenizer_dir)


@pytest.mark.parametrize(
    ("behaviour", "error", "sentence"),
    [
        (lambda s: [Refused("too long by 3", s.request_id)], InvalidRequestError, "too long by 3"),
        (end(FinishReason.REJECTED, "1000 requests are queued"), ServerBusyError, "1000 requests"),
        (end(FinishReason.REJECTED), ServerBusyError, "try again later"),
        (end(FinishReason.ERROR, "rank 3 is lost"), ServerError, "rank 3 is lost"),
        (
            lambda s: [Finished(s.request_id, FinishReason.ERROR, Usage(1, 0), "odd", True)],
            InvalidRequestError,
            "odd",
        ),
        (lambda s: [Tokens(s.request_id, 2, (5,))], ServerError, "tokens 0 to 1 were lost"),
    ],
)
def test_each_bad_end_is_its_own_exception(fake_coordinator, behaviour, error, sentence):
    fake_coordinator.behaviour = behaviour

    async def main():
        async with AsyncClient(fake_coordinator.endpoint) as client:
            generation = await client.submit([1])
            with pytest.raises(error, match=sentence):
                await collect(generation)
            assert generation.finish_reason is None

    run(main())


@pytest.mark.parametrize("reason", [FinishReason.TIMEOUT, FinishReason.ABORT])
def test_timeout_and_abort_are_normal_ends(fake_coordinator, reason):
    fake_coordinator.behaviour = end(reason)

    async def main():
        async with AsyncClient(fake_coordinator.endpoint) as client:
            assert (await (await client.submit([1])).wait()).finish_reason is reason

    run(main())


@pytest.mark.parametrize(
    ("prompt", "options", "sentence"),
    [
        ([1, "x"], {}, "int"),
        ([1] * 9_000_000 + [70_000] * 3_000_000, {}, "at most"),
        ([1], {"timeout_s": 0.0}, "timeout_s must be positive"),
        ([1], {"timeout_s": float("nan")}, "timeout_s must be positive"),
        ([1], {"params": SamplingParams(max_tokens=2.5)}, "int"),
    ],
    ids=["type", "size", "zero", "nan", "float"],
)
def test_what_cannot_be_sent_is_refused_here(fake_coordinator, prompt, options, sentence):
    async def main():
        async with AsyncClient(fake_coordinator.endpoint) as client:
            with pytest.raises(InvalidRequestError, match=sentence):
                await client.submit(prompt, **options)

    run(main())
    assert fake_coordinator.received(Submit) == []


def test_an_empty_stop_string_and_an_id_in_use_are_refused(fake_coordinator, tokenizer):
    fake_coordinator.behaviour = begin([5])

    async def main():
        async with AsyncClient(fake_coordinator.endpoint, tokenizer) as client:
            with pytest.raises(InvalidRequestError, match="must not be empty"):
                await client.submit([1], stop=[""])
            generation = await client.submit([1], request_id="mine")
            with pytest.raises(InvalidRequestError, match="'mine' is not finished"):
                await client.submit([1], request_id="mine")
            generation.cancel()

    run(main())


def test_nobody_there_is_told_within_the_timeout():
    async def main():
        client = AsyncClient("tcp://127.0.0.1:1", timeout_s=0.05)
        with pytest.raises(ServerUnavailableError, match=r"127\.0\.0\.1:1 within 0\.05 s"):
            async with client:
                pass
        with pytest.raises(ServerUnavailableError, match="closed"):
            await client.info()

    run(main())


@pytest.mark.parametrize("address", ["localhost", "tcp://127.0.0.1:65536"])
def test_a_wrong_address_is_a_value_error(address):
    async def main():
        with pytest.raises(ValueError, match=f"not a ZeroMQ address: '{address}'"):
            await AsyncClient(address).info()

    run(main())


def test_closing_ends_what_is_unfinished(fake_coordinator):
    fake_coordinator.behaviour = begin([5])

    async def main():
        client = AsyncClient(fake_coordinator.endpoint)
        generation = await client.submit([1])
        waiting = asyncio.create_task(generation.wait())
        await until(lambda: generation.token_ids)
        await client.aclose()
        await waiting
        assert generation.finish_reason is FinishReason.ABORT

    run(main())
