"""Faults on purpose, for tests and drills: none unless FASTSERVE_MEGA_FAULTS asks for some.

    FASTSERVE_MEGA_FAULTS=rank.before_step:delay=0.02,rank.send:drop@7

A fault is POINT:ACTION: at every call of a process, with @N at the N-th one only, or with @N+ from
the N-th one on. Where nothing is asked for, `at` returns the function itself.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

VARIABLE = "FASTSERVE_MEGA_FAULTS"
Point = Literal[
    "client.send",
    "client.receive",
    "rank.send",
    "rank.receive",
    "rank.before_step",
    "rank.after_step",
    "rank.copy",
    "rank.read_checkpoint",
]
Action = Literal["delay", "drop", "corrupt", "kill"]
_FRAMES: tuple[Action, ...] = ("delay", "drop", "corrupt", "kill")
_WORK: tuple[Action, ...] = ("delay", "drop", "kill")
_STEPS: tuple[Action, ...] = ("delay", "kill")
_POSSIBLE: dict[str, tuple[Action, ...]] = {
    "client.send": _FRAMES,
    "client.receive": _FRAMES,
    "rank.send": _FRAMES,
    "rank.receive": _FRAMES,
    "rank.before_step": _STEPS,
    "rank.after_step": _STEPS,
    "rank.copy": _WORK,
    "rank.read_checkpoint": _WORK,
}
_FAULT = re.compile(r"([a-z._]+):([a-z]+)(?:=([0-9.]+))?(?:@([0-9]+)(\+?))?")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens at a point, and at which calls."""

    point: str
    action: str
    seconds: float = 0.0
    first: int = 1
    last: int | None = None
    """None: at all from the first one on."""


def at(point: Point, function: F) -> F:
    """The function, or one that suffers the faults which are asked for at this point.

    A frame is the last argument of the function, or else its result.

    Raises:
        ValueError: the environment's variable cannot be understood.
    """
    text = os.environ.get(VARIABLE, "")
    for fault in parse(text) if text else ():
        if fault.point == point:
            function = cast("F", _with_fault(function, fault))
    return function


def parse(text: str) -> list[Fault]:
    """The faults that a text asks for.

    Raises:
        ValueError: it cannot be understood; the message says what.
    """
    return [_parse_one(word.strip()) for word in text.split(",")]


def _parse_one(word: str) -> Fault:
    if (match := _FAULT.fullmatch(word)) is None:
        raise ValueError(f"a fault is POINT:ACTION, got {word!r} ({VARIABLE})")
    point, action, seconds, number, onwards = match.groups()
    if (possible := _POSSIBLE.get(point)) is None:
        raise ValueError(f"there is no point {point!r} ({VARIABLE}): {', '.join(_POSSIBLE)}")
    if action not in possible:
        raise ValueError(f"{point} can have {', '.join(possible)}, got {action!r} ({VARIABLE})")
    first = int(number or 1)
    last = first if number and not onwards else None
    return Fault(point, action, float(seconds or 0), first, last)


def _with_fault(function: Callable[..., Any], fault: Fault) -> Callable[..., Any]:
    calls = itertools.count(1)

    def faulty(*arguments: Any) -> Any:
        number = next(calls)
        if number < fault.first or (fault.last is not None and number > fault.last):
            return function(*arguments)
        *others, last = arguments or (None,)
        match fault.action:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "delay":
                time.sleep(fault.seconds)
            case "drop" if fault.point == "rank.receive":
                function(*arguments)
            case "drop":
                return None
            case "corrupt" if isinstance(last, bytes):
                return function(*others, _corrupted(last))
            case _:
                return _corrupted(function(*arguments))
        return function(*arguments)

    return faulty


def _corrupted(frame: bytes) -> bytes:
    """The frame with all bits of its middle byte turned over."""
    middle = len(frame) // 2
    return frame[:middle] + bytes((frame[middle] ^ 0xFF,)) + frame[middle + 1 :]
