"""Copies between the KV pools of a rank, beside its computation. No torch here."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable, Collection, Sequence

from fastserve_mega import faults
from fastserve_mega.plan import BlockCopy

_WAKE = b"\0"


class CopyFailedError(RuntimeError):
    """A copy raised, or did not end in time; the pools cannot be trusted any more."""


class CopyEngine:
    """Executes copies in the order of the plans, in a thread of its own.

    All methods are for the thread of the worker loop. The order is what makes plans with
    `precedes_step` correct: such a copy may read what the one before it has written.
    """

    def __init__(self, move: Callable[[BlockCopy], float | None], timeout_s: float) -> None:
        """Start idle; the thread starts with the first copy.

        Args:
            move: copies the blocks and returns when they are there, with the seconds that took if
                they are fewer than those of the call; called in the thread.
            timeout_s: longest wait for a copy.
        """
        self._move = faults.at("rank.copy", move)
        self._timeout_s = timeout_s
        self._queue: queue.SimpleQueue[BlockCopy | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._unfinished: set[int] = set()
        self._finished: dict[int, float] = {}
        """Copies that `finished` has not told, with the seconds each took."""
        self._error: Exception | None = None
        self._wait_s = 0.0
        self._thread: threading.Thread | None = None
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def fileno(self) -> int:
        """A file descriptor that is readable when `finished` has something to say."""
        return self._reader.fileno()

    def start(self, copies: Sequence[BlockCopy]) -> None:
        """Let these copies follow those started before; returns at once."""
        if copies and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kv-copies", daemon=True)
            self._thread.start()
        with self._changed:
            self._unfinished.update(copy.copy_id for copy in copies)
        for copy in copies:
            self._queue.put(copy)

    def wait(self, copy_ids: Collection[int]) -> None:
        """Let what is computed from here on see these copies done.

        Raises:
            CopyFailedError: a copy failed, or is not done within the limit.
        """
        if not copy_ids:
            return
        begin = time.monotonic()
        with self._changed:
            done = self._changed.wait_for(
                lambda: self._error or self._unfinished.isdisjoint(copy_ids), self._timeout_s
            )
        self._wait_s += time.monotonic() - begin
        self._raise_error()
        if not done:
            raise CopyFailedError(f"copies are not done within {self._timeout_s:g} s")

    def take_wait_s(self) -> float:
        """Seconds for which `wait` has delayed computation since the last call."""
        wait_s, self._wait_s = self._wait_s, 0.0
        return wait_s

    def finished(self) -> dict[int, float]:
        """The copies that finished since the last call, in order, with the seconds each took.

        Raises:
            CopyFailedError: a copy failed.
        """
        with contextlib.suppress(BlockingIOError):
            while self._reader.recv(4096):
                pass
        self._raise_error()
        with self._changed:
            finished, self._finished = self._finished, {}
        return finished

    def close(self) -> None:
        """Let the thread end after what has been started, and release everything."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(self._timeout_s)
        self._reader.close()
        self._writer.close()

    def _run(self) -> None:
        while (copy := self._queue.get()) is not None:
            begin = time.monotonic()
            try:
                taken_s = self._move(copy)
            except Exception as error:
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                self._wake()
                return
            if taken_s is None:
                taken_s = time.monotonic() - begin
            with self._changed:
                self._finished[copy.copy_id] = taken_s
                self._unfinished.discard(copy.copy_id)
                self._changed.notify_all()
            self._wake()

    def _wake(self) -> None:
        # A full buffer is readable as well; a closed socket has nobody left to wake.
        with contextlib.suppress(OSError):
            self._writer.send(_WAKE)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise CopyFailedError(f"a KV copy failed: {self._error}") from self._error
