"""A conversation in the terminal, with a server that has no model."""

import io

from rich.console import Console

from fastserve_mega.system.config import Config, CoordinatorConfig, ModelConfig
from fastserve_mega.terminal.chat import run_chat


def converse(server, monkeypatch, model_directory, *lines):
    """The exit status, and what the terminal shows when these lines are typed; then Ctrl-D."""
    typed = iter(lines)

    def read():
        for line in typed:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", read)
    config = Config(
        model=ModelConfig(path=str(model_directory)),
        coordinator=CoordinatorConfig(client_endpoint=server.endpoint),
    )
    shown = io.StringIO()
    return run_chat(config, Console(file=shown, width=200)), shown.getvalue()


def test_each_question_is_answered_until_an_empty_line(start_server, monkeypatch, model_directory):
    monkeypatch.setattr("fastserve_mega.terminal.chat._MAX_TOKENS", 20)
    with start_server() as server:
        status, shown = converse(server, monkeypatch, model_directory, "the fox", "", "never asked")
    assert status == 0
    assert "an empty line ends" in shown
    assert shown.count("you:") == 2
    assert len(shown.splitlines()) >= 3


def test_the_end_of_the_input_ends_it(start_server, monkeypatch, model_directory):
    with start_server() as server:
        status, shown = converse(server, monkeypatch, model_directory)
    assert status == 0
    assert shown.count("you:") == 1


def test_a_refused_question_is_one_sentence(start_server, monkeypatch, model_directory):
    with start_server() as server:
        status, shown = converse(server, monkeypatch, model_directory, "the fox " * 20)
    assert status == 1
    assert "exceed the context of 512 tokens" in shown
    assert "Traceback" not in shown
