"""What a check found, and how checks are kept from harming each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "problem"]


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
