"""How many connections there may be, and how often is told of those that could not be."""

from __future__ import annotations

import logging
import resource

import pytest

from fastserve_mega.server.connections import FewWarnings, allow_connections, most_connections


def test_files_are_kept_free_for_what_comes_in_a_turn(monkeypatch):
    def connections(files):
        monkeypatch.setattr("resource.getrlimit", lambda _: (files, files))
        return most_connections()

    assert connections(1024) == 1024 - 100 - 4 * 64
    assert connections(256) == 128
    assert connections(10**6) == connections(resource.RLIM_INFINITY) == 10_000


def test_connections_that_are_asked_for_get_their_files_or_are_refused(monkeypatch):
    limits = [(1024, 4096)]
    monkeypatch.setattr("resource.getrlimit", lambda _: limits[-1])
    monkeypatch.setattr("resource.setrlimit", lambda _, new: limits.append(new))
    assert allow_connections(600) == 600
    assert len(limits) == 1
    assert allow_connections(2000) == 2000
    assert limits[-1] == (2000 + 100 + 4 * 64, 4096)
    with pytest.raises(ValueError, match=r"10000 needs 10356 open files, .* 4096 \(ulimit -Hn\)"):
        allow_connections(10_000)


def test_a_kind_of_warning_is_told_once_a_minute():
    now = [0.0]
    few = FewWarnings(clock=lambda: now[0])

    def passes(message):
        record = logging.LogRecord("n", logging.WARNING, "p", 1, message, (), None)
        return record.getMessage() if few.filter(record) else None

    assert passes("bad") == "bad"
    assert [passes("bad") for _ in range(20_000)] == [None] * 20_000
    assert passes("other") == "other"
    now[0] = 60.0
    assert passes("bad") == "bad (20001 times since this was last told)"


def test_what_cannot_be_accepted_is_told_once_and_other_errors_each_time():
    few = FewWarnings(clock=lambda: 0.0)

    def passes(message):
        return few.filter(logging.LogRecord("asyncio", logging.ERROR, "p", 1, message, (), None))

    accept = "socket.accept() out of system resource\nsocket: <fd=%d>"
    assert [passes(accept % number) for number in range(3)] == [True, False, False]
    assert [passes("Fatal error") for _ in range(2)] == [True, True]
