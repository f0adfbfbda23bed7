"""Whatever a client sends: one clear answer to it, and nobody else notices."""

import msgspec
import pytest
from fake_server import VOCAB, expected_tokens
from hypothesis import given
from hypothesis import strategies as st

from fastserve_mega.client import Client
from fastserve_mega.messaging.frames import PROTOCOL_VERSION
from fastserve_mega.messaging.messages import Cancel, Finished, Ping, Pong, Refused, Submit, Tokens
from fastserve_mega.messaging.rank_messages import Shutdown, StepResult
from fastserve_mega.types import FinishReason, SamplingParams


def frame(body, version=PROTOCOL_VERSION):
    return bytes((version,)) + msgspec.msgpack.encode(body)


GOOD = {"type": "Submit", "request_id": "r", "prompt": [1, 2], "params": {"max_tokens": 3}}

BAD_FRAMES = {
    "empty": (b"", "at least 1 byte, got 0"),
    "one byte": (bytes((PROTOCOL_VERSION,)), "not a message: Input data was truncated"),
    "later version": (frame(GOOD, version=9), "version 2, got a message of version 9"),
    "unknown type": (frame({"type": "Subscribe"}), "'Subscribe' is not one of Hello, Submit, "),
    "no type": (frame({"request_id": "r"}), "missing required field `type`"),
    "a number for a type": (frame({"type": 2}), "Expected `str`, got `int` - at `type`"),
    "not msgpack": (bytes((PROTOCOL_VERSION,)) + b"\xc1\xff", "malformed"),
    "cut off": (frame(GOOD)[:-1], "truncated"),
    "not a map": (frame([1, 2]), "Expected `object`"),
    "missing field": (
        frame({"type": "Submit", "request_id": "r"}),
        "Submit: Object missing required field `prompt`",
    ),
    "unknown field": (
        frame({**GOOD, "temprature": 1}),
        "Submit: unknown field 'temprature'; known fields are request_id, prompt, params, ",
    ),
    "unknown parameter": (
        frame({**GOOD, "params": {"top_q": 1}}),
        "'params.top_q'; known fields are max_tokens, temperature, top_p, ",
    ),
    "wrong type": (frame({**GOOD, "prompt": "hello"}), "prompt"),
    "negative count": (
        frame({"type": "GetSnapshot", "max_requests": -1}),
        "GetSnapshot: max_requests must be at least 0, got -1",
    ),
    "negative max_tokens": (
        frame({**GOOD, "params": {"max_tokens": -5}}),
        "max_tokens must be at least 1, got -5",
    ),
    "not a number": (
        frame({**GOOD, "params": {"temperature": float("nan")}}),
        "temperature must be between",
    ),
    "for workers only": (frame({"type": "Shutdown"}), "Shutdown is not for clients"),
    "deeply nested": (
        bytes((PROTOCOL_VERSION,)) + b"\x82\xa4type\xa6Submit\xa6prompt"
        + b"\x91" * 100_000 + b"\xc0",
        "Expected `int`, got `array`",
    ),
    "nothing but nesting": (
        bytes((PROTOCOL_VERSION,)) + b"\x91" * 100_000 + b"\xc0",
        "Expected `object`, got `array`",
    ),
}  # fmt: skip

HEADS = [
    b"",
    *(
        b"\x82\xa4type" + msgspec.msgpack.encode(name)
        for name in ("Submit", "Cancel", "GetSnapshot", "Tokens", "StepResult", "Nothing")
    ),
]
"""Of maps with one more field."""

BAD_REQUESTS = {
    "no prompt": ({"prompt": ()}, "at least 1 token"),
    "negative token": ({"prompt": (1, -2)}, f"between 0 and {VOCAB - 1}, got -2"),
    "token beyond the vocabulary": ({"prompt": (1, VOCAB)}, f"got {VOCAB}"),
    "bad received token": ({"received": (VOCAB,)}, "received token ids"),
    "too many received": ({"received": (1, 2, 3)}, "max_tokens is 3"),
    "over-long": ({"prompt": (1,) * 510}, "exceed the context of 512"),
    "no id": ({"request_id": ""}, "1 to 256 characters, got 0"),
    "long id": ({"request_id": "x" * 257}, "got 257"),
    "bad timeout": ({"timeout_s": -1.0}, "timeout_s must be a positive number, got -1.0"),
    "infinite timeout": ({"timeout_s": float("inf")}, "got inf"),
    "all tokens held back": (
        {"params": SamplingParams(min_tokens=2, stop_token_ids=tuple(range(1, VOCAB)))},
        f"holds back, are all {VOCAB} tokens of the vocabulary",
    ),
    "allowed token beyond the vocabulary": (
        {"params": SamplingParams(allowed_token_ids=(1, VOCAB))},
        f"allowed_token_ids token ids must be between 0 and {VOCAB - 1}",
    ),
    "bad word beyond the vocabulary": (
        {"params": SamplingParams(bad_words=((1, VOCAB),))},
        f"bad_words token ids must be between 0 and {VOCAB - 1}",
    ),
    "no allowed word but bad ones": (
        {"params": SamplingParams(allowed_token_ids=(1, 2), bad_words=((1,), (2,)))},
        "are all 2 tokens of allowed_token_ids",
    ),
    "no allowed token but ends": (
        {"params": SamplingParams(allowed_token_ids=(1,), min_tokens=1, stop_token_ids=(1,))},
        "min_tokens 1 holds back, are all 1 tokens of allowed_token_ids",
    ),
    "priority": ({"priority": 2000}, "between -1000 and 1000, got 2000"),
}


def assert_alive(client):
    """The same client can go on, and gets the right tokens."""
    client.send(Submit("good", (3, 4), SamplingParams(max_tokens=5, temperature=0.0)))
    *tokens, finished = client.receive_until(Finished)
    assert tuple(t for m in tokens for t in m.token_ids) == expected_tokens((3, 4), 5)
    assert finished.reason is FinishReason.LENGTH


def test_bad_frames_are_answered_and_harm_nobody(start_server, raw_client):
    with start_server() as server:
        bystander, client = raw_client(server), raw_client(server)
        server.runner.open_gate.clear()
        bystander.send(Submit("by", (7, 8), SamplingParams(max_tokens=9, temperature=0.0)))
        for name, (bad, expected) in BAD_FRAMES.items():
            client.send_frames(bad)
            answer = client.receive()
            assert isinstance(answer, Refused), name
            assert expected in answer.message, name
            assert "\n" not in answer.message
        client.send_frames(b"two", b"frames")
        assert "1 frame, got 2" in client.receive().message
        server.runner.open_gate.set()
        assert_alive(client)
        *tokens, _ = bystander.receive_until(Finished)
        assert tuple(t for m in tokens for t in m.token_ids) == expected_tokens((7, 8), 9)


def test_a_client_of_version_1_is_told_so_in_its_own_version(start_server, raw_client):
    with start_server() as server:
        client = raw_client(server)
        client.send_frames(b"\x01\x01\x80")  # Hello
        version, kind, *body = client.receive_frame()
        assert (version, kind) == (1, 35)
        assert msgspec.msgpack.decode(bytes(body))["message"] == (
            "this end speaks protocol version 2, got a message of version 1"
        )
        assert_alive(client)


def test_bad_requests_are_answered_by_id(start_server, raw_client):
    with start_server() as server:
        client = raw_client(server)
        for name, (change, expected) in BAD_REQUESTS.items():
            fields = {"request_id": "bad", "prompt": (1, 2), "params": SamplingParams(max_tokens=3)}
            client.send(Submit(**{**fields, **change}))
            answer = client.receive()
            assert isinstance(answer, Refused), name
            assert expected in answer.message, name
            assert answer.request_id == {**fields, **change}["request_id"]
        client.send(Cancel("nobody"))
        assert "no unfinished request 'nobody'" in client.receive().message
        assert_alive(client)


def test_one_client_cannot_cancel_the_request_of_another(start_server, raw_client):
    with start_server() as server:
        owner, stranger = raw_client(server), raw_client(server)
        server.runner.open_gate.clear()
        owner.send(Submit("mine", (3, 4), SamplingParams(max_tokens=5, temperature=0.0)))
        owner.send(Ping())
        assert isinstance(owner.receive(), Pong)
        stranger.send(Cancel("mine"))
        assert isinstance(stranger.receive(), Refused)
        server.runner.open_gate.set()
        *tokens, _ = owner.receive_until(Finished)
        assert tuple(t for m in tokens for t in m.token_ids) == expected_tokens((3, 4), 5)


def test_a_client_that_disconnects_frees_its_blocks(start_server, raw_client):
    with start_server(device_blocks=128) as server:
        client = raw_client(server)
        client.send(Submit("left", (1, 2, 3), SamplingParams(max_tokens=400, temperature=0.0)))
        assert isinstance(client.receive(), Tokens)
        client.close()
        with Client(server.endpoint) as other:
            # Each answer is a turn of the loop; the lost peer is noticed at the next token.
            for _ in range(10_000):
                if 'finish_reason="abort"' in other.metrics():
                    break
            metrics = other.metrics()
        assert 'fastserve_request_finished_total{finish_reason="abort"} 1.0' in metrics
        assert 'fastserve_device_blocks{state="owned"} 0.0' in metrics


def test_a_worker_message_on_the_client_port_is_refused(start_server, raw_client):
    with start_server() as server:
        client = raw_client(server)
        for message in (StepResult(0, (1,)), Shutdown()):
            client.send(message)
            assert "not for clients" in client.receive().message


@pytest.fixture(scope="module")
def running_server(model_directory):
    from fake_server import fake_server

    with fake_server(model_directory) as server:
        yield server


@given(junk=st.binary(max_size=60), head=st.sampled_from(HEADS))
def test_any_bytes_are_survived(running_server, junk, head):
    from fake_server import RawClient

    client = RawClient(running_server.endpoint)
    try:
        client.send_frames(bytes((PROTOCOL_VERSION,)) + head + junk)
        client.send(Ping())
        assert any(isinstance(message, Pong) for message in client.receive_until(Pong))
    finally:
        client.close()
