"""A conversation in the terminal, with a server that has no model."""

import io
import os
from types import SimpleNamespace

import pytest
from http_server import serving
from rich.console import Console

from fastserve_mega.terminal.chat import run_chat
from fastserve_mega.terminal.chat_server import connect
from fastserve_mega.text.tokenizer import Tokenizer


def converse(url, monkeypatch, *lines, max_tokens=20, typed=True):
    """The exit status, and what is shown for these lines, typed or from a pipe; then their end."""
    lines = iter(lines)

    def read(prompt):
        shown.write(prompt)
        for line in lines:
            if line is KeyboardInterrupt:
                raise KeyboardInterrupt
            return line
        raise EOFError

    shown = io.StringIO()
    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: typed))
    monkeypatch.setenv("XDG_STATE_HOME", os.devnull)  # no history is kept
    status = run_chat(url, max_tokens=max_tokens, console=Console(file=shown, width=200))
    return status, shown.getvalue()


@pytest.fixture
def asked(monkeypatch):
    """The messages of each question, as they are sent."""
    conversations = []

    def remembering(url):
        server = connect(url)
        answer = server.answer
        server.answer = lambda messages, params: (
            conversations.append(list(messages)) or answer(messages, params)
        )
        return server

    monkeypatch.setattr("fastserve_mega.terminal.chat.connect", remembering)
    return conversations


def test_each_question_is_answered_until_bye(start_server, monkeypatch):
    with start_server() as server:
        status, shown = converse(server.endpoint, monkeypatch, "the fox", "/bye", "never asked")
    assert status == 0
    assert shown.count("you: ") == 2
    assert "20 tokens, " in shown
    assert "tokens/s" in shown


def test_from_a_pipe_only_the_answer_is_shown(start_server, monkeypatch):
    with start_server() as server:
        status, shown = converse(server.endpoint, monkeypatch, "the fox", typed=False)
    assert status == 0
    assert shown.count("\n") == 1
    assert "you:" not in shown
    assert "tokens" not in shown


def test_over_http_as_well(start_server, monkeypatch, model_directory):
    with start_server() as server, serving(server, Tokenizer(model_directory)) as url:
        status, shown = converse(url, monkeypatch, "the fox")
    assert status == 0
    assert "20 tokens, " in shown


def test_what_was_said_is_told_again_until_it_is_cleared(start_server, monkeypatch, asked):
    lines = ("/system be brief", "one", "two", "/clear", "three \\", "and more", '"""a', 'b"""')
    with start_server() as server:
        converse(server.endpoint, monkeypatch, *lines, max_tokens=2)
    assert [[each["role"] for each in messages] for messages in asked] == [
        ["system", "user"],
        ["system", "user", "assistant", "user"],
        ["system", "user"],
        ["system", "user", "assistant", "user"],
    ]
    assert asked[2][-1]["content"] == "three \nand more"
    assert asked[3][-1]["content"] == "a\nb"


def test_the_end_of_the_input_ends_it_and_ctrl_c_does_not(start_server, monkeypatch):
    with start_server() as server:
        status, shown = converse(server.endpoint, monkeypatch, KeyboardInterrupt, "", "/what")
    assert status == 0
    assert shown.count("you: ") == 4
    assert "there is no /what" in shown


def test_ctrl_c_ends_the_answer_and_not_the_program(start_server, monkeypatch, asked):
    pieces = []

    def interrupted(self, *args, **kwargs):
        pieces.append(args)
        if len(pieces) == 3:
            raise KeyboardInterrupt
        original(self, *args, **kwargs)

    original = Console.print
    monkeypatch.setattr(Console, "print", interrupted)
    with start_server() as server:
        status, shown = converse(server.endpoint, monkeypatch, "the fox", "go on", max_tokens=200)
    assert status == 0
    assert [message["role"] for message in asked[1]] == ["user", "assistant", "user"]
    assert "200 tokens" in shown  # of the second answer


def test_a_refused_question_is_one_sentence_and_is_not_remembered(start_server, monkeypatch, asked):
    with start_server() as server:
        status, shown = converse(server.endpoint, monkeypatch, "zq " * 600, "fox")
    assert status == 0
    assert "exceed the context of 512 tokens" in shown
    assert [len(messages) for messages in asked] == [1, 1]
    assert "Traceback" not in shown


@pytest.mark.parametrize("scheme", ["ipc://{}/nobody", "http://127.0.0.1:9"])
def test_without_a_server_it_says_so(scheme, tmp_path, monkeypatch):
    monkeypatch.setattr("fastserve_mega.terminal.chat_server.CONNECT_S", 0.1)
    status, shown = converse(scheme.format(tmp_path), monkeypatch)
    assert status == 1
    assert "answer" in shown
