"""`fastserve-mega chat`: a conversation with a running server in the terminal."""

from __future__ import annotations

from rich.console import Console

from fastserve_mega.client import Client, ClientError
from fastserve_mega.system.config import Config
from fastserve_mega.types import SamplingParams

_MAX_TOKENS = 512


def run_chat(config: Config, console: Console | None = None) -> int:
    """Read lines, stream answers; an empty line or Ctrl-D ends. Returns the exit status."""
    console = console or Console(highlight=False)
    try:
        with Client(config.coordinator.client_endpoint) as client:
            console.print(f"[dim]{client.info().model_name}; an empty line ends[/dim]")
            _converse(client, console)
    except ClientError as error:
        console.print(f"[red]{error}[/red]")
        return 1
    except (EOFError, KeyboardInterrupt):
        console.print()
    return 0


def _converse(client: Client, console: Console) -> None:
    messages: list[dict[str, str]] = []
    params = SamplingParams(max_tokens=_MAX_TOKENS, temperature=0.7, top_p=0.9)
    while question := console.input("[bold]you:[/bold] ").strip():
        messages.append({"role": "user", "content": question})
        answer = client.chat(messages, params)
        for chunk in answer:
            console.print(chunk.text, end="", markup=False)
        console.print()
        messages.append({"role": "assistant", "content": answer.text})
