"""Whatever a client sends: one clear answer to it, and nobody else notices."""

import msgspec
import pytest
from fake_server import VOCAB, expected_tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastserve_mega.client import Client
from fastserve_mega.messaging.codec import PROTOCOL_VERSION
from fastserve_mega.messaging.messages import (
    Cancel,
    Finished,
    Kind,
    Ping,
    Pong,
    Refused,
    Shutdown,
    StepResult,
    Submit,
    Tokens,
)
from fastserve_mega.types import FinishReason, SamplingParams


def frame(kind, body, version=PROTOCOL_VERSION):
    return bytes((version, kind)) + msgspec.msgpack.encode(body)


GOOD = {"request_id": "r", "prompt": [1, 2], "params": {"max_tokens": 3}}

BAD_FRAMES = {
    "empty": (b"", "at least 2 bytes"),
    "one byte": (b"\x01", "at least 2 bytes"),
    "wrong version": (frame(Kind.SUBMIT, GOOD, version=9), "version 1, got 9"),
    "unknown kind": (frame(200, {}), "unknown message kind 200"),
    "not msgpack": (bytes((PROTOCOL_VERSION, Kind.SUBMIT)) + b"\xc1\xff", "malformed"),
    "cut off": (frame(Kind.SUBMIT, GOOD)[:-1], "truncated"),
    "not a map": (frame(Kind.SUBMIT, [1, 2]), "Expected `object`"),
    "missing field": (frame(Kind.SUBMIT, {"request_id": "r"}), "missing required field"),
    "unknown field": (frame(Kind.SUBMIT, {**GOOD, "temprature": 1}), "'temprature'"),
    "unknown parameter": (
        frame(Kind.SUBMIT, {**GOOD, "params": {"top_q": 1}}),
        "'params.top_q'",
    ),
    "wrong type": (frame(Kind.SUBMIT, {**GOOD, "prompt": "hello"}), "prompt"),
    "negative max_tokens": (
        frame(Kind.SUBMIT, {**GOOD, "params": {"max_tokens": -5}}),
        "max_tokens must be at least 1, got -5",
    ),
    "not a number": (
        frame(Kind.SUBMIT, {**GOOD, "params": {"temperature": float("nan")}}),
        "temperature must be between",
    ),
    "for workers only": (frame(Kind.SHUTDOWN, {}), "Shutdown is not for clients"),
    "deeply nested": (
        bytes((PROTOCOL_VERSION, Kind.SUBMIT)) + b"\x91" * 100_000 + b"\xc0",
        "submit: ",
    ),
}

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
        f"which are all {VOCAB} tokens of the vocabulary",
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


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(junk=st.binary(max_size=60), kind=st.sampled_from([1, 2, 3, 4, 5, 33, 66, 250]))
def test_any_bytes_are_survived(running_server, junk, kind):
    from fake_server import RawClient

    client = RawClient(running_server.endpoint)
    try:
        client.send_frames(bytes((PROTOCOL_VERSION, kind)) + junk)
        client.send(Ping())
        assert any(isinstance(message, Pong) for message in client.receive_until(Pong))
    finally:
        client.close()
