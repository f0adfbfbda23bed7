"""Processes as the kernel relates them: who ends with whom, and ending a tree of them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Collection, Iterable
from pathlib import Path

_PROC = Path("/proc")
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_STOPPED = "T"
"""Not "t", which a debugger does."""
_LIBC = ctypes.CDLL(None)


def adopt_orphans() -> None:
    """Make this process the parent of all descendants whose own parent ends; Linux only.

    Without it, what a killed mpirun leaves behind belongs to init, and nobody finds it.
    """
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, in whatever way; Linux only.

    SIGKILL, since SIGTERM asks for an orderly end, which may take as long as it likes.
    """
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def is_running(process_id: int) -> bool:
    """Whether a process is there and has not ended."""
    if _PROC.is_dir():
        return _read_parent(process_id) is not None
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def descendants(ancestor: int) -> set[int]:
    """All processes below one that have not ended; empty where there is no /proc."""
    if not _PROC.is_dir():
        return set()
    numbers = (int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit())
    parents = {number: _read_parent(number) for number in numbers}
    below: set[int] = set()
    newest = {ancestor}
    while newest:
        newest = {child for child, parent in parents.items() if parent in newest} - below
        below |= newest
    return below


def stopped(ancestor: int) -> set[int]:
    """Processes that a signal has stopped, of one and all below it; empty without /proc."""
    everyone = {ancestor} | descendants(ancestor) if _PROC.is_dir() else set()
    states = {process_id: _read_stat(process_id) for process_id in everyone}
    return {process_id for process_id, stat in states.items() if stat and stat[0] == _STOPPED}


def end_descendants(*, keep: Iterable[int] = (), grace_s: float = 0.0) -> None:
    """Kill all processes below this one, and those that they start meanwhile.

    Args:
        keep: processes that are left alone, with all below them.
        grace_s: how long they may take to end by themselves first.
    """
    kept = set(keep)
    kept |= set[int]().union(*(descendants(process_id) for process_id in kept))
    own = os.getpid()
    _await_end(descendants(own) - kept, grace_s)
    while found := descendants(own) - kept:
        for process_id in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGKILL)
        for process_id in found:
            _await_end([process_id], None)
            # Those that this process has adopted would stay as zombies.
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process_id, os.WNOHANG)


def await_any_end(process_ids: Iterable[int], limit_s: float) -> None:
    """Wait until one of some children has ended, whether or not it was waited for; or so long."""
    if sys.platform != "linux":
        time.sleep(limit_s)
        return
    handles = []
    try:
        for process_id in process_ids:
            with contextlib.suppress(ProcessLookupError):
                handles.append(os.pidfd_open(process_id))
        select.select(handles, [], [], limit_s)
    finally:
        for handle in handles:
            os.close(handle)


def _await_end(process_ids: Collection[int], limit_s: float | None) -> None:
    """Wait until all have ended, or for so long."""
    deadline = None if limit_s is None else time.monotonic() + limit_s
    for process_id in process_ids:
        try:
            handle = os.pidfd_open(process_id)
        except ProcessLookupError:
            continue
        try:
            left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            select.select([handle], [], [], left_s)
        finally:
            os.close(handle)


def _read_parent(process_id: int) -> int | None:
    """Process id of the parent; None for one that has ended."""
    stat = _read_stat(process_id)
    return None if stat is None or stat[0] in "ZX" else stat[1]


def _read_stat(process_id: int) -> tuple[str, int] | None:
    """State and parent of a process; None when there is none."""
    try:
        stat = (_PROC / str(process_id) / "stat").read_text()
    except OSError:
        return None
    # The name in parentheses may contain spaces and parentheses.
    state, parent = stat.rpartition(")")[2].split()[:2]
    return state, int(parent)
