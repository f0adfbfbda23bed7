from __future__ import annotations

import gc

import pytest
from asynchronous import collect, params, run, until, wait_for
from fake_coordinator import start_fake_coordinator

from fastserve_mega.client import (
    AsyncClient,
    Chunk,
    InvalidRequestError,
    TokenizerUnavailableError,
)
from fastserve_mega.client.testing import answer, begin
from fastserve_mega.messaging.messages import Cancel, Hello, Submit
from fastserve_mega.text.tokenizer import Tokenizer
from fastserve_mega.types import FinishReason, Usage

TEXT = "the quick brown fox 日本語 🙂 jumps"


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir):
    return Tokenizer(tiny_tokenizer_dir)


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
