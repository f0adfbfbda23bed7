from __future__ import annotations

import asyncio
import gc

import msgspec
import pytest
import zmq
import zmq.asyncio
from fake_coordinator import start_fake_coordinator

from fastserve_mega.client import (
    AsyncClient,
    Chunk,
    InvalidRequestError,
    ServerBusyError,
    ServerError,
    ServerUnavailableError,
    TokenizerUnavailableError,
)
from fastserve_mega.client.testing import WAIT_S, answer, begin, end
from fastserve_mega.messaging.frames import decode
from fastserve_mega.messaging.messages import Cancel, Finished, Hello, Ping, Refused, Submit, Tokens
from fastserve_mega.text.tokenizer import Tokenizer
from fastserve_mega.types import FinishReason, SamplingParams, Usage

TEXT = "the quick brown fox 日本語 🙂 jumps"


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir):
    return Tokenizer(tiny_tokenizer_dir)


def run(coroutine):
    """Run a test that must end in time."""
    return asyncio.run(asyncio.wait_for(coroutine, 2 * WAIT_S))


def params(**values):
    return SamplingParams(**{"max_tokens": 100, **values})


async def collect(generation):
    return [chunk async for chunk in generation]


async def wait_for(coordinator, kind, count=1):
    return await asyncio.to_thread(coordinator.wait_for, kind, count)


async def until(condition):
    """Let the loop run until the condition holds; `run` limits it."""
    while not condition():
        await asyncio.sleep(0)


# --- the plain case ------------------------------------------------------------------------------


def test_a_text_prompt_streams_text(fake_coordinator, tokenizer):
    ids = tokenizer.encode(TEXT)
    fake_coordinator.behaviour = answer([*ids, 2])

    async def main():
        async with AsyncClient(fake_coordinator.endpoint, tokenizer) as client:
            generation = await client.generate("hello fox", params(seed=7))
            chunks = await collect(generation)
            assert "".join(chunk.text for chunk in chunks) == generation.text == TEXT
            assert generation.token_ids == (*ids, 2)
            assert tuple(t for chunk in chunks for t in chunk.token_ids) == (*ids, 2)
            assert generation.finish_reason is FinishReason.STOP
            prompt = tokenizer.encode("hello fox")
            assert generation.usage == Usage(len(prompt), len(ids) + 1)
            (submit,) = fake_coordinator.received(Submit)
            assert submit == Submit(generation.request_id, tuple(prompt), params(seed=7))

    run(main())


def test_token_ids_need_no_tokenizer(fake_coordinator):
    async def main():
        async with AsyncClient(fake_coordinator.endpoint) as client:
            generation = await client.submit([1, 2, 3])
            assert await collect(generation) == [Chunk("", (t,)) for t in (5, 6, 7, 8)]
            with pytest.raises(TokenizerUnavailableError, match=r"/nowhere/tiny.*send token ids"):
                await client.generate("text")
            with pytest.raises(TokenizerUnavailableError):
                await client.generate([1], stop=["x"])

    run(main())


def test_the_tokenizer_is_taken_from_the_servers_directory(tiny_tokenizer_dir, tokenizer):
    coordinator = start_fake_coordinator(model_path=str(tiny_tokenizer_dir))
    coordinator.behaviour = answer(tokenizer.encode(TEXT))

    async def main():
        async with AsyncClient(coordinator.endpoint) as client:
            assert (await (await client.generate("fox", params())).wait()).text == TEXT

    run(main())
    coordinator.close()


def test_chat_sends_the_templated_conversation(fake_coordinator, tokenizer):
    messages = [{"role": "user", "content": "hi"}]

    async def main():
        async with AsyncClient(fake_coordinator.endpoint, tokenizer) as client:
            await (await client.chat(messages, timeout_s=3.0, priority=-1)).wait()
            with pytest.raises(InvalidRequestError, match="narrator"):
                await client.chat([{"role": "narrator", "content": "once"}])

    run(main())
    (submit,) = fake_coordinator.received(Submit)
    assert list(submit.prompt) == tokenizer.apply_chat_template(messages)
    assert (submit.timeout_s, submit.priority) == (3.0, -1)


def test_info_ping_and_metrics(fake_coordinator):
    async def main():
        async with AsyncClient(fake_coordinator.endpoint) as client:
            assert await client.info() == fake_coordinator.welcome
            assert await client.ping() == "epoch-0"
            assert await client.metrics() == "fake_requests_total 1\n"

    run(main())
    assert len(fake_coordinator.received(Hello)) == 1


def test_the_client_draws_a_seed(fake_coordinator):
    async def main():
        async with AsyncClient(fake_coordinator.endpoint) as client:
            for _ in range(2):
                await (await client.submit([1])).wait()

    run(main())
    first, second = (submit.params.seed for submit in fake_coordinator.received(Submit))
    assert first is not None
    assert first != second


# --- stopping ------------------------------------------------------------------------------------


def test_a_stop_string_ends_the_answer_and_the_work_on_it(fake_coordinator, tokenizer):
    fake_coordinator.behaviour = begin(tokenizer.encode(TEXT))

    async def main():
        async with AsyncClient(fake_coordinator.endpoint, tokenizer) as client:
            generation = await client.generate("x", params(), stop="brown")
            assert "".join(chunk.text for chunk in await collect(generation)) == "the quick "
            assert generation.finish_reason is FinishReason.STOP
            assert generation.usage.completion_tokens == len(generation.token_ids)
            assert await wait_for(fake_coordinator, Cancel) == [Cancel(generation.request_id)]

    run(main())


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("x 日", "the quick brown fo"),
        (["zz", "日"], "the quick brown fox "),
        (None, TEXT),
        ((), TEXT),
    ],
)
def test_stop_takes_one_string_or_several_or_none(fake_coordinator, tokenizer, stop, text):
    fake_coordinator.behaviour = answer(tokenizer.encode(TEXT))

    async def main():
        async with AsyncClient(fake_coordinator.endpoint, tokenizer) as client:
            chat = [{"role": "user", "content": "hi"}]
            for start in (
                client.generate("x", params(), stop=stop),
                client.chat(chat, params(), stop=stop),
                client.submit([1], params(), stop=stop),
            ):
                generation = await start
                assert (await generation.wait()).text == text

    run(main())


@pytest.mark.parametrize("stop", [["a", None], 5, b"ab", ["a"] * 200])
def test_what_is_no_stop_string_is_refused_by_the_client(fake_coordinator, tokenizer, stop):
    async def main():
        async with AsyncClient(fake_coordinator.endpoint, tokenizer) as client:
            with pytest.raises(InvalidRequestError, match="stop must"):
                await client.generate("x", params(), stop=stop)

    run(main())
    assert fake_coordinator.received(Submit) == []


def test_cancel_ends_at_once_and_keeps_what_arrived(fake_coordinator):
    fake_coordinator.behaviour = begin([5, 6])

    async def main():
        async with AsyncClient(fake_coordinator.endpoint) as client:
            generation = await client.submit([1])
            await until(lambda: len(generation.token_ids) == 2)
            generation.cancel()
            generation.cancel()
            assert [chunk.token_ids for chunk in await collect(generation)] == [(5,), (6,)]
            assert generation.finish_reason is FinishReason.ABORT
            assert generation.usage == Usage(1, 2)
            assert await client.ping()  # the server's own Finished(abort) hurts nobody

    run(main())
    assert len(fake_coordinator.received(Cancel)) == 1


def test_a_dropped_generation_is_cancelled(fake_coordinator):
    fake_coordinator.behaviour = begin([5])

    async def main():
        async with AsyncClient(fake_coordinator.endpoint) as client:
            generation = await client.submit([1])
            request_id = generation.request_id
            async for _ in generation:
                break
            del generation
            gc.collect()
            assert await wait_for(fake_coordinator, Cancel) == [Cancel(request_id)]

    run(main())


# --- errors --------------------------------------------------------------------------------------


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


def test_a_wrong_address_is_a_value_error():
    async def main():
        with pytest.raises(ValueError, match="not a ZeroMQ address: 'localhost'"):
            await AsyncClient("localhost").info()

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


# --- losing the coordinator and finding it again -------------------------------------------------


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
