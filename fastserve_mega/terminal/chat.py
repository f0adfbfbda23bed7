"""`fastserve-mega chat`: a conversation with a running server in the terminal."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from fastserve_mega.client import ClientError, ServerUnavailableError
from fastserve_mega.terminal.chat_server import ChatServer, connect
from fastserve_mega.types import SamplingParams

_HELP = """\
/system TEXT  begin anew, with TEXT as what the model is told first
/clear        begin anew
/bye          end, as Ctrl-D does
Ctrl-C        end an answer
\\             at the end of a line: the question goes on in the next one
\"\"\"           around a question of many lines"""
_MANY_LINES = '"""'
_HISTORY_LINES = 1000


@dataclass
class Conversation:
    """What was said so far."""

    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, str]]:
        """For the model."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return [*first, *self.turns]

    def add(self, role: str, content: str) -> None:
        """Say something."""
        self.turns.append({"role": role, "content": content})


def run_chat(
    url: str,
    *,
    system: str | None = None,
    temperature: float = 0.7,
    max_tokens: int = 512,
    console: Console | None = None,
) -> int:
    """Read questions, stream answers; /bye or Ctrl-D ends. Returns the exit status.

    Args:
        url: of the server, HTTP or ZeroMQ.
        system: what the model is told first.
        temperature: 0 is greedy.
        max_tokens: of an answer.
        console: where to write.
    """
    console = console or Console(highlight=False)
    try:
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature)
        server = connect(url)
    except (ClientError, ValueError) as error:
        console.print(f"[red]{error}[/red]")
        return 1
    with contextlib.closing(server), _line_editing():
        if _is_typed():
            console.print(f"[dim]{server.model}; /help lists what can be typed[/dim]")
        return _converse(server, Conversation(system), params, console)


def _converse(
    server: ChatServer, conversation: Conversation, params: SamplingParams, console: Console
) -> int:
    for question in _questions(console):
        if question.startswith("/"):
            if _obey(question, conversation, console):
                break
            continue
        conversation.add("user", question)
        try:
            text = _answer(server, conversation, params, console)
        except ServerUnavailableError as error:
            console.print(f"[red]{error}[/red]")
            return 1
        except ClientError as error:
            console.print(f"[red]{error}[/red]")
            conversation.turns.pop()
        else:
            conversation.add("assistant", text)
    return 0


def _answer(
    server: ChatServer, conversation: Conversation, params: SamplingParams, console: Console
) -> str:
    """Stream an answer to the terminal; Ctrl-C leaves what has come so far."""
    began, text, num_tokens = time.perf_counter(), "", None
    pieces = server.answer(conversation.messages, params)
    try:
        while True:
            piece = next(pieces)
            text += piece
            console.print(piece, end="", markup=False, soft_wrap=True)
    except StopIteration as end:
        num_tokens = end.value
    except KeyboardInterrupt:
        pieces.close()
    console.print()
    if num_tokens and _is_typed():
        seconds = time.perf_counter() - began
        console.print(
            f"[dim]{num_tokens} tokens, {num_tokens / max(seconds, 1e-9):.1f} tokens/s[/dim]"
        )
    return text


def _obey(command: str, conversation: Conversation, console: Console) -> bool:
    """Do what a line with a slash says; whether that ends it all."""
    name, _, text = command.partition(" ")
    match name:
        case "/bye" | "/exit" | "/quit":
            return True
        case "/clear":
            conversation.turns.clear()
        case "/system":
            conversation.system = text.strip() or None
            conversation.turns.clear()
        case "/help":
            console.print(_HELP, markup=False)
        case _:
            console.print(f"there is no {name}; /help lists what can be typed", markup=False)
    return False


def _questions(console: Console) -> Iterator[str]:
    """What is asked, until Ctrl-D."""
    while True:
        try:
            question = _read_question().strip()
        except EOFError:
            if _is_typed():
                console.print()
            return
        except KeyboardInterrupt:
            console.print()
            continue
        if question:
            yield question


def _read_question() -> str:
    line = input(_prompt("you: "))
    if line.startswith(_MANY_LINES):
        lines = [line.removeprefix(_MANY_LINES)]
        while not lines[-1].rstrip().endswith(_MANY_LINES):
            lines.append(input(_prompt("...  ")))
        return "\n".join(lines).rstrip().removesuffix(_MANY_LINES)
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1].removesuffix("\\")
        lines.append(input(_prompt("...  ")))
    return "\n".join(lines)


def _prompt(text: str) -> str:
    return text if _is_typed() else ""


def _is_typed() -> bool:
    """Whether somebody is there; to a program only the answers are written."""
    return sys.stdin.isatty()


@contextlib.contextmanager
def _line_editing() -> Iterator[None]:
    """Arrow keys edit and recall lines, those of earlier conversations as well."""
    if not _is_typed():
        yield
        return
    import readline

    state = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    path = state / "fastserve_mega" / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(_HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            readline.write_history_file(path)
