"""Tells from an event log what happened to one request."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastserve_mega.coordinator.event_log import StepCall, read_event_log
from fastserve_mega.scheduling.events import Arrived
from fastserve_mega.scheduling.story import Happening, Storyteller
from fastserve_mega.types import RequestId


@dataclass(frozen=True)
class Story:
    """One request's way through the scheduler."""

    request_id: RequestId
    happenings: tuple[Happening, ...]
    """Times count from its arrival."""
    is_as_logged: bool
    """Whether the scheduler of today makes the plans of the log; else the story is another."""


def read_story(path: Path, name: str) -> Story:
    """Follow a request through a log, whose calls are repeated on a fresh scheduler.

    Args:
        path: what the server wrote (`coordinator.event_log`).
        name: id of the request, or its beginning if no other request's id begins like that.

    Raises:
        ValueError: the log is not valid, or has no such request, or several.
        OSError: the file cannot be read.
    """
    setup, read = read_event_log(path)
    calls = list(read)
    request_id = _find(path, calls, name)
    scheduler = setup.make_scheduler()
    teller = Storyteller(scheduler, request_id)
    is_as_logged = True
    for call in calls:
        try:
            plan = scheduler.step(call.now, call.events)
        except Exception:  # the live run ended here as well, or it is another story
            is_as_logged &= call.error is not None
            break
        teller.follow(call.now, call.events, plan)
        is_as_logged &= plan == call.plan
    start_s = teller.happenings[0].time_s if teller.happenings else 0.0
    happenings = tuple(Happening(each.time_s - start_s, each.text) for each in teller.happenings)
    return Story(request_id, happenings, is_as_logged)


def _find(path: Path, calls: list[StepCall], name: str) -> RequestId:
    ids = [each.request_id for call in calls for each in call.events if isinstance(each, Arrived)]
    ids = list(dict.fromkeys(ids))
    if name in ids:
        return RequestId(name)
    found = [each for each in ids if each.startswith(name)]
    if len(found) == 1:
        return found[0]
    among = found or ids
    some = ", ".join(among[:5]) + (", …" if len(among) > 5 else "")
    if found:
        raise ValueError(f"{path}: {len(found)} requests begin with {name!r}: {some}")
    raise ValueError(f"{path}: has no request {name!r}; it has {len(ids)}: {some or 'none'}")
