"""Answer a file of requests."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from fastserve_mega.commands.command import (
    FILE,
    Command,
    complete_with,
    fail,
    load_deployment,
    pass_on,
)

_DEFAULT_URL = "http://127.0.0.1:8000"
_API_KEY = "FASTSERVE_API_KEY"


def _batch(options: argparse.Namespace) -> int:
    from fastserve_mega.offline.batch import BatchOptions, run_batch

    def run(url: str) -> int:
        return run_batch(
            BatchOptions(
                url=url,
                requests=options.requests,
                answers=options.answers,
                concurrency=max(options.concurrency, 1),
                patience_s=options.patience,
                api_key=os.environ.get(_API_KEY),
            )
        )

    if options.config is None and not options.overrides:
        url = options.url or _DEFAULT_URL
        if not url.startswith(("http://", "https://")):
            return fail(options, f"--url must begin with http:// or https://, got {url!r}")
        return run(url)
    config = load_deployment(options, weights=True)
    from fastserve_mega.launcher import LaunchError, http_url, temporary_deployment

    try:
        with temporary_deployment(config, pass_on(options), http=True, restarts=True) as started:
            return run(http_url(started))
    except LaunchError as error:
        return fail(options, error)


def _add_batch(parser: argparse.ArgumentParser) -> None:
    for name, what in (("requests", "to answer"), ("answers", "to append to")):
        file = parser.add_argument(
            name, type=Path, metavar=f"{name.upper()}.jsonl", help=f"the file {what}"
        )
        complete_with(file, FILE)
    parser.add_argument("--url", help=f"of a running server; default: {_DEFAULT_URL}")
    parser.add_argument(
        "--concurrency",
        type=int,
        default=32,
        metavar="N",
        help="requests that the server has at a time; default 32",
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="longest time without any answer; default 600",
    )


COMMAND = Command(
    name="batch",
    summary="answer a file of requests, in OpenAI's batch format",
    description="Sends each line of a file to a running server, or with MODEL or --config to "
    "one that it starts and ends itself, and appends the answers to another file as they come. "
    "Killed and started again it goes on: every line is answered once. Requests have the lowest "
    f"priority unless they name their own. {_API_KEY} in the environment is sent as the key.",
    examples=(
        "requests.jsonl answers.jsonl --url http://127.0.0.1:8000",
        "Qwen/Qwen3-8B requests.jsonl answers.jsonl --tensor 2",
    ),
    run=_batch,
    extra="terminal",
    add_arguments=_add_batch,
    config="model",
)
