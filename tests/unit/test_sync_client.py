from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import fastserve_mega
from fastserve_mega.client import (
    Client,
    InvalidRequestError,
    RequestOptions,
    ServerBusyError,
    ServerUnavailableError,
)
from fastserve_mega.client.testing import WAIT_S, answer, begin, end
from fastserve_mega.messaging.messages import Cancel, Submit
from fastserve_mega.text.tokenizer import Tokenizer
from fastserve_mega.types import FinishReason, SamplingParams

TEXT = "the lazy dog 🙂"


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir):
    return Tokenizer(tiny_tokenizer_dir)


@pytest.fixture
def client(fake_coordinator, tokenizer):
    with Client(fake_coordinator.endpoint, tokenizer) as client:
        yield client


def test_a_generation_is_an_iterator_of_chunks(fake_coordinator, client, tokenizer):
    ids = tokenizer.encode(TEXT)
    fake_coordinator.behaviour = answer(ids)
    generation = client.generate("hello", SamplingParams(max_tokens=100))
    chunks = list(generation)
    assert "".join(chunk.text for chunk in chunks) == generation.text == TEXT
    assert generation.token_ids == tuple(ids)
    assert generation.finish_reason is FinishReason.STOP
    assert generation.usage.completion_tokens == len(ids)
    assert generation.request_id == fake_coordinator.received(Submit)[0].request_id


def test_chat_and_submit_and_wait(fake_coordinator, client, tokenizer):
    assert client.chat([{"role": "user", "content": "hi"}]).wait().token_ids == (5, 6, 7, 8)
    assert client.submit([1, 2]).wait().finish_reason is FinishReason.STOP
    assert fake_coordinator.received(Submit)[1].prompt == (1, 2)


def test_info_and_metrics(fake_coordinator, client):
    assert client.info() == fake_coordinator.welcome
    assert client.metrics().startswith("fake_requests_total")


def test_cancel(fake_coordinator, client):
    fake_coordinator.behaviour = begin([5])
    generation = client.submit([1])
    assert next(generation).token_ids == (5,)
    generation.cancel()
    assert list(generation) == []
    assert generation.finish_reason is FinishReason.ABORT
    fake_coordinator.wait_for(Cancel)


def test_dropping_a_generation_cancels_it(fake_coordinator, client):
    fake_coordinator.behaviour = begin([5])
    for _ in client.submit([1]):
        break
    fake_coordinator.wait_for(Cancel)


def test_errors_come_out_of_the_calls(fake_coordinator, client):
    fake_coordinator.behaviour = end(FinishReason.REJECTED, "full")
    with pytest.raises(ServerBusyError, match="full"):
        client.submit([1]).wait()
    with pytest.raises(InvalidRequestError, match="timeout_s"):
        client.generate("x", timeout_s=-1.0)


def test_threads_share_a_client(fake_coordinator, client):
    fake_coordinator.behaviour = lambda submit: answer([submit.prompt[0]] * 5)(submit)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: client.submit([i]).wait().token_ids, range(3, 40)))
    assert answers == [(i,) * 5 for i in range(3, 40)]


def test_closing_wakes_a_thread_that_waits(fake_coordinator, tokenizer):
    fake_coordinator.behaviour = begin([5])
    client = Client(fake_coordinator.endpoint, tokenizer)
    generation = client.submit([1])
    next(generation)

    def wait():
        with contextlib.suppress(ServerUnavailableError):
            generation.wait()

    thread = threading.Thread(target=wait)
    thread.start()
    client.close()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    client.close()
    with pytest.raises(ServerUnavailableError, match="closed"):
        client.info()


def test_nobody_there_is_told_and_the_thread_ends():
    before = threading.active_count()
    with (
        pytest.raises(ServerUnavailableError, match="no answer"),
        Client("tcp://127.0.0.1:1", timeout_s=0.05),
    ):
        pass
    assert threading.active_count() == before


def test_a_program_that_forgets_to_close_still_ends(fake_coordinator):
    program = (
        "from fastserve_mega import Client\n"
        f"client = Client({fake_coordinator.endpoint!r})\n"
        "generation = client.submit([1])\n"
        "print(next(generation).token_ids)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    assert (done.stdout, done.stderr) == ("(5,)\n", "")


def test_options_can_be_kept_and_used_for_several_requests(fake_coordinator, client):
    options: RequestOptions = {"priority": 2, "cache_salt": "tenant", "timeout_s": 5.0}
    options |= {"expected_output_tokens": 7, "session": "agent"}
    client.generate("hello", **options).wait()
    client.chat([{"role": "user", "content": "hi"}], **options).wait()
    client.submit([1], **options).wait()
    submits = fake_coordinator.received(Submit)
    assert len(submits) == 3
    assert {(s.priority, s.cache_salt, s.timeout_s) for s in submits} == {(2, "tenant", 5.0)}
    assert {(s.expected_output_tokens, s.session) for s in submits} == {(7, "agent")}


@pytest.mark.parametrize("name", ["generate", "chat", "submit"])
def test_an_option_that_does_not_exist_is_a_type_error(fake_coordinator, client, name):
    prompt = [{"role": "user", "content": "hi"}] if name == "chat" else [1]
    with pytest.raises(TypeError, match="prio"):
        getattr(client, name)(prompt, prio=1)
    assert fake_coordinator.received(Submit) == []


def test_the_package_exports_the_clients():
    assert fastserve_mega.Client is Client
    assert fastserve_mega.RequestOptions is RequestOptions
