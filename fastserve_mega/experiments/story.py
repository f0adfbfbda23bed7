"""Tells what happened to one request, from the steps of its scheduler or an event log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastserve_mega.coordinator.event_log import StepCall, read_event_log
from fastserve_mega.plan import Plan
from fastserve_mega.scheduling.events import Aborted, Arrived, Event, StepDone, WorkersLost
from fastserve_mega.scheduling.request import Request, RequestStatus
from fastserve_mega.scheduling.scheduler import Scheduler
from fastserve_mega.types import RequestId


@dataclass(frozen=True, slots=True)
class Happening:
    """One line of a story."""

    time_s: float
    """Seconds of the scheduler's clock."""
    text: str


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a request was like after a step."""

    status: RequestStatus
    level: int
    num_computed_tokens: int
    num_device_blocks: int
    num_passed_over: int
    waiting_since: float


@dataclass(frozen=True, slots=True)
class _Run:
    """Steps in a row that had the request."""

    first_step: int
    last_step: int
    num_steps: int
    num_tokens: int
    since_s: float


class Storyteller:
    """Follows one request through a scheduler; call `follow` after each `Scheduler.step`."""

    def __init__(self, scheduler: Scheduler, request_id: RequestId) -> None:
        self.happenings: list[Happening] = []
        self._scheduler = scheduler
        self._request_id = request_id
        self._request: Request | None = None
        self._seen: _Seen | None = None
        self._run: _Run | None = None

    def follow(self, now: float, events: Sequence[Event], plan: Plan | None) -> None:
        """Tell what a step, which was given these events, changed for the request."""
        for event in events:
            if isinstance(event, Arrived) and event.request_id == self._request_id:
                self._begin(event, now)
        request, before = self._request, self._seen
        if request is None or before is None:
            return
        after = _look_at(request)
        for event in events:
            if isinstance(event, WorkersLost):
                self._tell(now, "the ranks were lost, and with them its KV")
                before = replace(before, num_computed_tokens=0, num_device_blocks=0)
        if not request.is_finished:
            self._tell_level(now, before, after)
            self._tell_status(now, before, after, request)
        self._follow_plan(now, plan)
        if request.is_finished:
            self._end(now, request, events)
        else:
            self._seen = after

    # --- the parts of a story --------------------------------------------------------------------

    def _begin(self, event: Arrived, now: float) -> None:
        request = self._request = self._scheduler.find(self._request_id)
        if request is None:
            return
        text = (
            f"arrived with {event.num_prompt_tokens} prompt tokens, max_tokens {event.max_tokens}"
        )
        if event.num_received_tokens:
            text += f", and {event.num_received_tokens} tokens of an answer"
        if cached := request.kv.num_cached_tokens:
            text += f"; {cached} tokens are in the prefix cache"
        self._tell(now, f"{text}{self._joined(request)}")
        self._seen = replace(_look_at(request), status=RequestStatus.WAITING, num_device_blocks=0)

    def _joined(self, request: Request) -> str:
        levels = len(self._scheduler.level_lengths())
        if self._scheduler.level_names or levels == 1:
            return ""
        return f"; joins Q{request.queue.level + 1} of {levels}"

    def _tell_level(self, now: float, before: _Seen, after: _Seen) -> None:
        if after.level == before.level:
            return
        if names := self._scheduler.level_names:
            self._tell(now, f"was {names[before.level]}, is {names[after.level]}")
        elif after.level < before.level:
            waited_s = now - before.waiting_since
            self._tell(
                now, f"waited {waited_s:.3f} s: from Q{before.level + 1} to Q{after.level + 1}"
            )
        else:
            self._tell(now, f"used up Q{before.level + 1}: to Q{after.level + 1}")

    def _tell_status(self, now: float, before: _Seen, after: _Seen, request: Request) -> None:
        had_kv = before.num_device_blocks > 0
        match after.status:
            case RequestStatus.SWAPPING_OUT | RequestStatus.SWAPPED if had_kv:
                copied = len(request.kv.host_table) - request.kv.num_clean_blocks
                self._tell(
                    now,
                    f"preempted for {self._cause(request)}: {copied} blocks go to the host, "
                    f"{request.kv.num_clean_blocks} are there already",
                )
            case RequestStatus.SWAPPED if before.status is RequestStatus.SWAPPING_OUT:
                self._tell(now, "is in host memory")
            case RequestStatus.WAITING if before.num_computed_tokens:
                where = "preempted" if had_kv else "dropped from the host"
                self._tell(
                    now,
                    f"{where} for {self._cause(request)}: the KV of "
                    f"{request.kv.num_dropped_tokens} tokens will be computed again",
                )
            case RequestStatus.SWAPPING_IN if before.status is not RequestStatus.SWAPPING_IN:
                self._tell(now, f"comes back to {after.num_device_blocks} device blocks")
            case RequestStatus.READY | RequestStatus.RUNNING if (
                before.status is RequestStatus.SWAPPING_IN
            ):
                self._tell(now, "is back")
            case RequestStatus.READY | RequestStatus.RUNNING if not had_kv:
                passed = before.num_passed_over
                waited = f" after {passed} steps without memory" if passed else ""
                self._tell(now, f"gets {after.num_device_blocks} device blocks{waited}")
            case _:
                pass

    def _cause(self, request: Request) -> str:
        return request.kv.preempted_for or "the arrivals that are expected"

    def _follow_plan(self, now: float, plan: Plan | None) -> None:
        pieces = [p for p in plan.batch if p.request_id == self._request_id] if plan else []
        for piece in pieces:
            step = plan.step_id if plan else 0
            run = self._run or _Run(step, step, 0, 0, now)
            self._run = replace(
                run,
                last_step=step,
                num_steps=run.num_steps + 1,
                num_tokens=run.num_tokens + piece.num_tokens,
            )

    def _end(self, now: float, request: Request, events: Sequence[Event]) -> None:
        finished = any(
            isinstance(event, StepDone) and self._request_id in event.finished for event in events
        )
        aborted = any(
            isinstance(event, Aborted) and event.request_id == self._request_id for event in events
        )
        how = "finished" if finished or not aborted else "aborted"
        # The last token is not among those of which KV would be needed.
        tokens = request.num_tokens - request.num_prompt_tokens + finished
        self._tell(now, f"{how} after {tokens} tokens")
        self._request = self._seen = None

    def _tell(self, now: float, text: str) -> None:
        if run := self._run:
            self._run = None
            steps = f"step {run.first_step}"
            if run.num_steps > 1:
                steps = f"{run.num_steps} of the steps {run.first_step} to {run.last_step}"
            self.happenings.append(
                Happening(run.since_s, f"ran in {steps}: {run.num_tokens} tokens")
            )
        self.happenings.append(Happening(now, text))


def _look_at(request: Request) -> _Seen:
    return _Seen(
        status=request.status,
        level=request.queue.level,
        num_computed_tokens=request.num_computed_tokens,
        num_device_blocks=len(request.kv.block_table),
        num_passed_over=request.num_passed_over,
        waiting_since=request.waiting_since,
    )


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
