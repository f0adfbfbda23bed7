"""The scheduler's log: all it was told and all it answered, so that a run can be repeated.

One JSON object per line. The first has what a `Scheduler` is made of; each other one is a call of
`Scheduler.step`: `{"now": …, "events": [{"type": "Arrived", …}, …], "plan": {…}}`.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec

from fastserve_mega.plan import Plan
from fastserve_mega.records import Record, convert, explain
from fastserve_mega.scheduling.cost_model import Profile, ProfiledCostModel
from fastserve_mega.scheduling.events import Event
from fastserve_mega.scheduling.kv.pool import PoolSizes
from fastserve_mega.scheduling.scheduler import Scheduler
from fastserve_mega.system.config import SchedulerConfig, SwapConfig

_log = logging.getLogger(__name__)


class SchedulerSetup(Record, frozen=True, kw_only=True):
    """All that a live `Scheduler` is made of."""

    scheduler: SchedulerConfig
    swap: SwapConfig
    pools: PoolSizes
    profile: Profile
    window: int
    """Steps in flight at once."""
    first_step_id: int

    def make_scheduler(self) -> Scheduler:
        """A fresh scheduler."""
        return Scheduler(
            self.scheduler,
            ProfiledCostModel(self.profile),
            self.pools,
            swap=self.swap,
            window=self.window,
            first_step_id=self.first_step_id,
        )


class StepCall(Record, frozen=True):
    """One call of `Scheduler.step`."""

    now: float
    """Seconds of the coordinator's clock."""
    events: tuple[Event, ...]
    plan: Plan | None
    error: str | None = None
    """What the scheduler raised instead of a plan."""


_decoder = msgspec.json.Decoder(type=StepCall)
StepFunction = Callable[[float, Sequence[Event]], Plan | None]
"""`Scheduler.step`, or what records it."""


class EventLogWriter:
    """Appends to a log. When the disk fails, recording ends and serving goes on."""

    def __init__(self, path: Path) -> None:
        """Replace the file.

        Raises:
            OSError: it cannot be written.
        """
        # Unbuffered: each line is one write, so that a killed process leaves whole lines.
        self._file: BinaryIO | None = path.open("wb", buffering=0)
        self._encoder = msgspec.json.Encoder()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def write(self, record: SchedulerSetup | StepCall) -> None:
        """Write one more line; the first one is the setup."""
        if self._file is None:
            return
        line = self._encoder.encode(record) + b"\n"
        try:
            written = self._file.write(line)
            if written != len(line):  # what the disk has room for
                self._file.truncate(self._file.tell() - (written or 0))
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            _log.error("the event log ends here: %s", error)
            self.close()


def recorded(scheduler: Scheduler, writer: EventLogWriter) -> StepFunction:
    """Return `Scheduler.step` that is recorded, also when it fails."""

    def step(now: float, events: Sequence[Event] = ()) -> Plan | None:
        try:
            plan = scheduler.step(now, events)
        except Exception as error:
            writer.write(StepCall(now, tuple(events), None, error_text(error)))
            raise
        writer.write(StepCall(now, tuple(events), plan))
        return plan

    return step


def error_text(error: Exception) -> str:
    """An exception as the log has it."""
    return f"{type(error).__name__}: {error}"


def read_event_log(path: Path) -> tuple[SchedulerSetup, Iterator[StepCall]]:
    """The setup and the calls of a log, read as they are asked for.

    Raises:
        ValueError: (also while iterating) a line is not what `EventLogWriter` writes.
        OSError: the file cannot be read.
    """
    lines = _numbered_lines(path)
    number, first = next(lines, (0, b""))
    if not number:
        raise ValueError(f"{path} is empty")
    try:
        setup = convert(msgspec.json.decode(first), SchedulerSetup)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}") from None
    return setup, (_step_call(path, *line) for line in lines)


def _numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        yield from enumerate(file, 1)


def _step_call(path: Path, number: int, line: bytes) -> StepCall:
    try:
        return _decoder.decode(line)
    except msgspec.ValidationError as error:
        message = explain(error, msgspec.json.decode(line), StepCall)
    except ValueError as error:
        message = str(error)
    raise ValueError(f"{path}, line {number}: {message}")
