"""What a check found, and how checks are kept from harming each other.

What crashes or hangs in a process of its own (`run_probe`) does no harm here.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["ok", "warning", "problem"]
PROBE_TIMEOUT_S = 120.0
"""Importing torch takes half a minute on a machine whose disk is busy."""
_SAID_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class Finding:
    """A row of the report."""

    status: Status
    subject: str
    found: str
    remedy: str = ""
    """What to install or change; empty when there is nothing to do."""


@dataclass(frozen=True, slots=True)
class Check:
    """Something to look at."""

    subject: str
    run: Callable[[], Iterable[Finding]]

    def findings(self) -> list[Finding]:
        """What it found; a check that fails is a finding itself."""
        try:
            return list(self.run())
        except Exception as error:  # a broken machine breaks checks in unforeseen ways
            said = f"the check itself failed: {type(error).__name__}: {error}"
            return [Finding("problem", self.subject, said, "report it as a bug of fastserve-mega")]


def ok(subject: str, found: str) -> Finding:
    return Finding("ok", subject, found)


def warning(subject: str, found: str, remedy: str) -> Finding:
    return Finding("warning", subject, found, remedy)


def problem(subject: str, found: str, remedy: str) -> Finding:
    return Finding("problem", subject, found, remedy)


class ProbeError(Exception):
    """The process ended badly or not at all; str() is its last word."""


def run_probe(command: Sequence[str], timeout_s: float = PROBE_TIMEOUT_S) -> str:
    """What a command prints.

    Raises:
        ProbeError: it could not be started, failed, or took longer than `timeout_s`.
    """
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        raise ProbeError(f"no answer after {timeout_s:g} s") from None
    except OSError as error:
        raise ProbeError(str(error)) from None
    if done.returncode != 0:
        raise ProbeError(_last_word(done.stderr or done.stdout, done.returncode))
    return done.stdout


def python_probe(code: str, timeout_s: float = PROBE_TIMEOUT_S) -> Any:
    """Run Python code and read the JSON on the last line it prints.

    Raises:
        ProbeError: see `run_probe`; or there is no JSON.
    """
    said = run_probe([sys.executable, "-c", code], timeout_s)
    try:
        return json.loads(said.strip().splitlines()[-1])
    except (ValueError, IndexError):
        raise ProbeError(f"said nothing of use: {said[:_SAID_CHARACTERS]!r}") from None


def _last_word(said: str, status: int) -> str:
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    lines = [line.strip() for line in said.splitlines() if line.strip(" -=")]
    return (lines[-1] if lines else f"exit status {status}")[:_SAID_CHARACTERS]
