"""The coordinator for tests of applications, as an application's author uses it."""

import subprocess
import sys

import pytest

from fastserve_mega.client import Client, InvalidRequestError, ServerBusyError
from fastserve_mega.client.testing import FakeCoordinator, Submit, end, say
from fastserve_mega.text.byte_tokenizer import VOCAB_SIZE, write_byte_tokenizer
from fastserve_mega.text.tokenizer import Tokenizer
from fastserve_mega.types import FinishReason, SamplingParams

QUESTION = [{"role": "user", "content": "Where is naïve 🙂?"}]
PLENTY = SamplingParams(max_tokens=100)


def test_an_application_gets_the_text_and_the_test_sees_its_request():
    with FakeCoordinator("日本 is here") as coordinator, Client(coordinator.endpoint) as client:
        answer = client.chat(QUESTION, PLENTY, priority=-1).wait()
        assert (answer.text, answer.finish_reason) == ("日本 is here", FinishReason.STOP)
        (submit,) = coordinator.received(Submit)
    assert submit.priority == -1
    assert coordinator.text_of(submit.prompt) == "user\nWhere is naïve 🙂?\nassistant\n"


def test_max_tokens_and_stop_strings_end_its_answers():
    with FakeCoordinator("one two three") as coordinator, Client(coordinator.endpoint) as client:
        short = client.generate("count", SamplingParams(max_tokens=3)).wait()
        assert (short.text, short.finish_reason) == ("one", FinishReason.LENGTH)
        assert client.generate("count", PLENTY, stop=" three").wait().text == "one two"


def test_it_says_something_else_from_then_on():
    with FakeCoordinator() as coordinator, Client(coordinator.endpoint) as client:
        assert client.generate("hi").wait().text == "Hello!"
        coordinator.behaviour = say("Bye!")
        assert client.generate("hi").wait().text == "Bye!"
        coordinator.behaviour = end(FinishReason.REJECTED, "full")
        with pytest.raises(ServerBusyError, match="full"):
            client.generate("hi").wait()
        coordinator.reset()
        assert client.generate("hi").wait().text == "Hello!"


def test_what_it_does_not_know_is_refused():
    with (
        FakeCoordinator() as coordinator,
        Client(coordinator.endpoint) as client,
        pytest.raises(InvalidRequestError, match="does not answer GetSnapshot"),
    ):
        client.snapshot()


def test_every_text_comes_back_from_the_tokenizer_of_bytes(tmp_path):
    write_byte_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.vocab_size == VOCAB_SIZE
    text = "".join(map(chr, range(0x20, 0x500))) + "\n\t日本🙂"
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_it_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import fastserve_mega.client.testing"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
