"""The asynchronous client loses the coordinator, and finds it again."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
import zmq
import zmq.asyncio
from asynchronous import collect, params, run, until, wait_for

from fastserve_mega.client import (
    AsyncClient,
    InvalidRequestError,
    ServerUnavailableError,
)
from fastserve_mega.client.testing import WAIT_S, answer, begin
from fastserve_mega.messaging.frames import decode
from fastserve_mega.messaging.messages import Finished, Hello, Ping, Submit, Tokens
from fastserve_mega.text.tokenizer import Tokenizer
from fastserve_mega.types import FinishReason, Usage

TEXT = "the quick brown fox 日本語 🙂 jumps"


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir):
    return Tokenizer(tiny_tokenizer_dir)


@pytest.mark.parametrize("same_epoch", [False, True], ids=["restarted", "connection lost"])
def test_a_stream_goes_on_where_it_stopped(fake_coordinator, tokenizer, same_epoch):
    ids = tokenizer.encode(TEXT)
    fake_coordinator.behaviour = begin(ids[:5])

    async def main():
        async with AsyncClient(fake_coordinator.endpoint, tokenizer) as client:
            generation = await client.generate("x", params(), timeout_s=60.0)
            await until(lambda: len(generation.token_ids) == 5)
            fake_coordinator.behaviour = answer(ids)
            fake_coordinator.restart(same_epoch=same_epoch)
            chunks = await collect(generation)
            assert [t for chunk in chunks for t in chunk.token_ids] == ids
            assert generation.text == TEXT
            first, second = await wait_for(fake_coordinator, Submit, 2)
            assert second.received == tuple(ids[:5])
            assert second.params == first.params
            assert second.request_id == first.request_id
            assert 0 < second.timeout_s < 60.0
            assert (await client.info()).epoch == fake_coordinator.welcome.epoch

    run(main())


def test_tokens_that_come_twice_are_dropped(fake_coordinator):
    def behaviour(submit):
        rid = submit.request_id
        yield Tokens(rid, 0, (5, 6))
        yield Tokens(rid, 0, (5,))
        yield Tokens(rid, 1, (6, 7))
        yield Finished(rid, FinishReason.LENGTH, Usage(1, 3))

    fake_coordinator.behaviour = behaviour

    async def main():
        async with AsyncClient(fake_coordinator.endpoint) as client:
            generation = await client.submit([1])
            assert [chunk.token_ids for chunk in await collect(generation)] == [(5, 6), (7,)]

    run(main())


def test_a_missed_heartbeat_makes_the_client_submit_again(fake_coordinator):
    fake_coordinator.behaviour = begin([5])

    async def main():
        client = AsyncClient(fake_coordinator.endpoint, heartbeat_s=0.02, silence_timeout_s=60.0)
        async with client:
            generation = await client.submit([1])
            await until(lambda: generation.token_ids)
            fake_coordinator.silent = True
            pings = len(fake_coordinator.received(Ping))
            await wait_for(fake_coordinator, Ping, pings + 3)
            fake_coordinator.behaviour = answer([5, 6, 7])
            fake_coordinator.silent = False
            await generation.wait()
            assert generation.token_ids == (5, 6, 7)
            assert fake_coordinator.received(Submit)[1].received == (5,)

    run(main())


def test_a_silent_coordinator_fails_the_requests_in_time(fake_coordinator):
    fake_coordinator.behaviour = begin([5])

    async def main():
        client = AsyncClient(fake_coordinator.endpoint, heartbeat_s=0.02, silence_timeout_s=0.1)
        async with client:
            generation = await client.submit([1])
            fake_coordinator.silent = True
            with pytest.raises(ServerUnavailableError, match=r"has not answered for 0\.1 s"):
                await generation.wait()

    run(main())


def test_a_coordinator_that_is_started_again_may_be_silent_for_longer(fake_coordinator):
    fake_coordinator.behaviour = begin([5])
    fake_coordinator.welcome = msgspec.structs.replace(
        fake_coordinator.welcome, restart_within_s=2 * WAIT_S
    )

    async def main():
        client = AsyncClient(fake_coordinator.endpoint, heartbeat_s=0.01, silence_timeout_s=0.02)
        async with client:
            generation = await client.submit([1])
            await until(lambda: generation.token_ids)
            fake_coordinator.silent = True
            pings = len(fake_coordinator.received(Ping))
            await wait_for(fake_coordinator, Ping, pings + 5)  # 0.05 s: more than 0.02
            fake_coordinator.behaviour = answer([5, 6, 7])
            fake_coordinator.silent = False
            fake_coordinator.restart()
            await generation.wait()
            assert generation.token_ids == (5, 6, 7)

    run(main())


def test_pings_go_on_while_requests_are_unfinished_and_then_end(fake_coordinator):
    fake_coordinator.behaviour = begin([5])

    async def main():
        async with AsyncClient(fake_coordinator.endpoint, heartbeat_s=0.01) as client:
            generation = await client.submit([1])
            await wait_for(fake_coordinator, Ping, 3)
            generation.cancel()
            session = client._session
            await until(lambda: not session._busy.is_set())

    run(main())


@pytest.mark.parametrize(
    ("tokens", "values", "reason"),
    [
        ((5, 2), {}, FinishReason.STOP),
        ((5, 9), {"stop_token_ids": (9,)}, FinishReason.STOP),
        ((5, 2), {"ignore_eos": True, "max_tokens": 2}, FinishReason.LENGTH),
    ],
)
def test_when_only_the_end_was_lost_nothing_is_submitted(fake_coordinator, tokens, values, reason):
    fake_coordinator.behaviour = begin(tokens)

    async def main():
        async with AsyncClient(fake_coordinator.endpoint) as client:
            generation = await client.submit([1], params(**values))
            await until(lambda: len(generation.token_ids) == 2)
            fake_coordinator.restart()
            await generation.wait()
            assert generation.finish_reason is reason
            assert generation.usage == Usage(1, 2)

    run(main())
    assert len(fake_coordinator.received(Submit)) == 1


def test_a_server_of_another_version_is_named_at_once():
    async def main():
        context = zmq.asyncio.Context()
        router = context.socket(zmq.ROUTER)
        port = router.bind_to_random_port("tcp://127.0.0.1")
        client = AsyncClient(f"tcp://127.0.0.1:{port}")
        try:
            info = asyncio.create_task(client.info())
            peer, hello = await router.recv_multipart()
            assert decode(hello) == Hello()
            refused = {"message": "version 1, got 2", "request_id": None}
            await router.send_multipart([peer, b"\x01\x23" + msgspec.msgpack.encode(refused)])
            with pytest.raises(InvalidRequestError, match="2, got a message of version 1"):
                await info
        finally:
            await client.aclose()
            context.destroy(linger=0)

    run(main())
