"""What happened to one request, from an event log."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastserve_mega.commands.command import FILE, Command, complete_with, fail


def _story(options: argparse.Namespace) -> int:
    from fastserve_mega.experiments.story import read_story

    try:
        story = read_story(options.log, options.request_id)
    except (ValueError, OSError) as error:
        return fail(options, error)
    print(f"request {story.request_id}, seconds since it arrived")
    for happening in story.happenings:
        print(f"{happening.time_s:10.3f}  {happening.text}")
    if not story.is_as_logged:
        print(
            "fastserve-mega story: this version plans otherwise than the one that wrote the log",
            file=sys.stderr,
        )
        return 1
    return 0


def _add_story(parser: argparse.ArgumentParser) -> None:
    log = parser.add_argument("log", type=Path, metavar="LOG", help="what the server wrote")
    parser.add_argument(
        "request_id", metavar="ID", help="of the request (X-Request-Id), or how its id begins"
    )
    complete_with(log, FILE)


COMMAND = Command(
    name="story",
    summary="what happened to one request, and why",
    description="Repeats the file that coordinator.event_log names and tells one request's way: "
    "which level it joined, when it ran, why it was demoted, promoted or preempted, and for whom. "
    "To answer why an answer took so long.",
    examples=("events.jsonl chatcmpl-3f2a",),
    run=_story,
    add_arguments=_add_story,
    config="none",
)
