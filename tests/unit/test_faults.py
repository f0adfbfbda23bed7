"""Faults happen where and when they are asked for, and else not."""

import os
import signal

import pytest

from fastserve_mega import faults


def double(frame: bytes) -> bytes:
    return frame + frame


@pytest.fixture
def ask(monkeypatch):
    def set_faults(text):
        monkeypatch.setenv(faults.VARIABLE, text)

    return set_faults


def test_nothing_is_put_in_between_where_nothing_is_asked_for(ask, monkeypatch):
    monkeypatch.delenv(faults.VARIABLE, raising=False)
    assert faults.at("rank.send", double) is double
    ask("rank.receive:drop")
    assert faults.at("rank.send", double) is double


@pytest.mark.parametrize(
    ("asked", "dropped"),
    [("", {1, 2, 3, 4}), ("@2", {2}), ("@3+", {3, 4})],
)
def test_a_fault_happens_at_the_calls_that_it_names(ask, asked, dropped):
    ask(f"rank.copy:drop{asked}")
    copy = faults.at("rank.copy", double)
    assert {number for number in range(1, 5) if copy(b"x") is None} == dropped


def test_a_frame_that_is_sent_or_received_is_corrupted(ask):
    ask("rank.send:corrupt,rank.receive:corrupt@1")
    assert faults.at("rank.send", bytes.upper)(b"abc") == bytes((0x41, 0x62 ^ 0xFF, 0x43))
    receive = faults.at("rank.receive", lambda: b"abc")
    assert receive() == bytes((0x61, 0x62 ^ 0xFF, 0x63))
    assert receive() == b"abc"


def test_a_frame_that_is_dropped_before_it_is_received_is_followed_by_the_next(ask):
    ask("rank.receive:drop@1")
    frames = iter([b"first", b"second"])
    assert faults.at("rank.receive", lambda: next(frames))() == b"second"


def test_delay_and_kill_come_before_the_call(ask, monkeypatch):
    done = []
    monkeypatch.setattr("time.sleep", done.append)
    monkeypatch.setattr(os, "kill", lambda _, number: done.append(number))
    ask("rank.before_step:delay=0.5,rank.after_step:kill@2")
    faults.at("rank.before_step", done.append)("step")
    last = faults.at("rank.after_step", done.append)
    last("told")
    last("told")
    assert done == [0.5, "step", "told", signal.SIGKILL, "told"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rank.send", "POINT:ACTION, got 'rank.send'"),
        ("rank.sned:drop", "no point 'rank.sned'"),
        ("rank.before_step:corrupt", "can have delay, kill, got 'corrupt'"),
    ],
)
def test_what_cannot_be_understood_is_told(ask, text, told):
    ask(text)
    with pytest.raises(ValueError, match=told):
        faults.at("rank.send", double)
