"""Connections that say nothing, slowly or too often; the time is the test's."""

from __future__ import annotations

import asyncio
import json

import pytest
import uvicorn
from uvicorn.server import ServerState

from fastserve_mega.server.connections import bounded_connections


def told(transport):
    """Status and message of an answer that did not come from the application."""
    head, _, body = transport.written.partition(b"\r\n\r\n")
    assert b"Content-Length: %d\r\n" % len(body) in head
    assert transport.closed
    return int(head.split()[1]), json.loads(body)["error"]["message"]


HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n"


class Transport(asyncio.Transport):
    """Remembers what is done to it."""

    def __init__(self):
        super().__init__()
        self.closed, self.written = False, b""

    def write(self, data):
        self.written += data

    def close(self):
        self.closed = True

    def abort(self):
        self.closed = True

    def is_closing(self):
        return self.closed

    def pause_reading(self):
        pass

    def resume_reading(self):
        pass


class Loop:
    """A clock, and what was asked of it."""

    def __init__(self):
        self.now, self.timers = 0.0, []

    def time(self):
        return self.now

    def call_later(self, delay, call, *args):
        timer = Timer(self.now + delay, call, args)
        self.timers.append(timer)
        return timer

    def create_task(self, work):
        work.close()
        return Task()

    def advance(self, seconds):
        self.now += seconds
        due = [each for each in self.timers if each.at <= self.now]
        self.timers = [each for each in self.timers if each.at > self.now]
        for timer in due:
            if not timer.cancelled:
                timer.call(*timer.args)


class Task:
    def add_done_callback(self, callback):
        pass


class Timer:
    def __init__(self, at, call, args):
        self.at, self.call, self.args, self.cancelled = at, call, args, False

    def cancel(self):
        self.cancelled = True


@pytest.fixture
def connect(monkeypatch):
    loop, state = Loop(), ServerState()

    async def app(scope, receive, send):
        raise AssertionError("the loop runs nothing")

    config = uvicorn.Config(app, log_config=None, ws="none", http=bounded_connections(3))
    config.load()

    def connect():
        transport = Transport()
        made = config.http_protocol_class(config, state, {}, loop)
        made.connection_made(transport)
        return made, transport

    connect.loop = loop
    return connect


def test_a_head_that_does_not_come_ends_the_connection(connect):
    made, transport = connect()
    made.data_received(HEAD[:20])
    connect.loop.advance(9.0)
    made.data_received(HEAD[20:21])  # a byte now and then gives no more time
    assert not transport.closed
    connect.loop.advance(1.0)
    assert told(transport) == (408, "the request's head was not complete within 10 s")


def test_a_body_that_does_not_come_ends_the_connection(connect):
    made, transport = connect()
    made.data_received(HEAD + b"x")
    connect.loop.advance(59.0)
    made.data_received(b"x")
    assert not transport.closed
    connect.loop.advance(1.0)
    assert told(transport) == (408, "the request's body was not complete within 60 s")


def test_who_asks_nothing_is_told_nothing(connect):
    _, transport = connect()
    connect.loop.advance(10.0)
    assert (transport.closed, transport.written) == (True, b"")


GET = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize("empty", [b"\r\n", b"\n", b"\r\n\r\n", b"\r\n" * 100_000])
def test_empty_lines_before_a_request_are_none_of_it(connect, empty):
    made, transport = connect()
    made.data_received(empty + GET)
    assert made.scope["path"] == "/v1/models"
    assert not transport.closed


def test_an_empty_line_before_a_request_may_come_in_pieces(connect):
    made, transport = connect()
    for piece in (b"\r", b"\n\r", b"\n", GET):
        made.data_received(piece)
    assert made.scope["path"] == "/v1/models"
    assert not transport.closed


@pytest.mark.parametrize(
    ("sent", "status", "sentence"),
    [
        (b"nonsense\r\n\r\n", 400, "not valid HTTP: illegal request line"),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "not valid HTTP: Missing mandatory Host: header"),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 2**17, 431, "not valid HTTP: Receive buffer too long"),
        (
            HEAD.replace(b"Content-Length: 5", b"Transfer-Encoding: gzip"),
            501,
            "not valid HTTP: Only Transfer-Encoding: chunked is supported",
        ),
        (
            HEAD.replace(b"Host", b"Transfer-Encoding: chunked\r\nHost"),
            400,
            "Content-Length and Transfer-Encoding exclude each other",
        ),
    ],
)
def test_what_is_wrong_with_the_bytes_is_told_in_the_shape_of_all_errors(
    connect, sent, status, sentence
):
    made, transport = connect()
    made.data_received(sent)
    got, message = told(transport)
    assert (got, message[: len(sentence)]) == (status, sentence)
    assert transport.closed


def test_a_body_that_goes_on_long_after_its_answer_ends_the_connection(connect):
    made, transport = connect()
    made.data_received(HEAD.replace(b"5", b"1000000000"))
    piece = b" " * 2**20
    for _ in range(20):
        made.data_received(piece)
    assert not transport.closed
    made.cycle.response_complete = True
    for _ in range(16):
        made.data_received(piece)
    assert not transport.closed
    made.data_received(piece)
    assert transport.closed


def test_a_whole_request_may_be_answered_for_as_long_as_it_takes(connect):
    made, transport = connect()
    made.data_received(HEAD + b"12345")
    connect.loop.advance(3600.0)
    assert not transport.closed


def test_a_client_that_has_no_more_to_say_may_read_for_a_moment(connect):
    made, transport = connect()
    assert not made.eof_received()  # nothing is asked
    made.data_received(HEAD + b"12345")
    assert made.eof_received()
    connect.loop.advance(0.9)
    assert not transport.closed
    connect.loop.advance(0.1)
    assert transport.closed


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        (b"http://127.0.0.1:8000/v1/models?a=/", "/v1/models", b"a=/"),
        (b"HTTPS://x/http://y", "/http://y", b""),
        (b"http://x", "/", b""),
        (b"/http://x", "/http://x", b""),
    ],
)
def test_a_target_with_a_host_is_the_path_in_it(connect, target, path, query):
    made, _ = connect()
    made.data_received(b"GET " + target + b" HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (made.scope["path"], made.scope["query_string"]) == (path, query)


def test_one_more_takes_the_place_of_the_one_that_was_idle_longest(connect):
    busy, _ = connect()
    busy.data_received(HEAD + b"12345")
    idle = []
    for _ in range(3):
        connect.loop.advance(1.0)
        idle.append(connect()[1])
    assert [each.closed for each in idle] == [True, False, False]


def test_of_many_that_come_in_one_turn_each_closes_another_one(connect):
    transports = [connect()[1] for _ in range(10)]
    assert [each.closed for each in transports].count(False) == 3


def test_where_all_are_busy_one_more_gets_503(connect):
    for _ in range(3):
        connect()[0].data_received(HEAD + b"12345")
    _, transport = connect()
    assert told(transport) == (503, "all 3 connections are busy (server.max_connections)")
    assert b"Retry-After: 1\r\n" in transport.written


CHUNKED = HEAD.replace(b"Content-Length: 5", b"Transfer-Encoding: chunked")


def test_a_body_of_very_many_tiny_chunks_is_refused_before_all_are_looked_at(connect):
    made, transport = connect()
    made.data_received(CHUNKED + b"1\r\n \r\n" * 50_000)
    status, message = told(transport)
    assert status == 400
    assert message.endswith("bytes may come in 2056 pieces, got one more")
    assert made.cycle.body.count(b" ") <= 2056


def test_chunks_of_a_usual_size_are_as_many_as_they_like(connect):
    made, transport = connect()
    made.flow.pause_reading = lambda: None  # nobody reads here
    made.data_received(CHUNKED)
    for _ in range(3000):
        made.data_received(b"400\r\n" + b" " * 1024 + b"\r\n")
    assert len(made.cycle.body) == 3000 * 1024
    assert not transport.closed
