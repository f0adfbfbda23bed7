"""Rank 0's handle on the coordinator process it starts."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

from fastserve_mega.messaging.rank_messages import STOP_WORD
from fastserve_mega.worker.loop import CoordinatorLostError
from fastserve_mega.worker.rank_group import SaidError

_END_TIMEOUT_S = 30.0
_WATCH_INTERVAL_S = 0.2


class CoordinatorChild:
    """A child process; it ends when its stdin closes, so it cannot outlive rank 0."""

    def __init__(self, arguments: Sequence[str]) -> None:
        """Start it and read the address it prints.

        Args:
            arguments: of `fastserve-mega coordinator`.

        Raises:
            SaidError: it ended at once; it has said why on stderr.
        """
        command = [sys.executable, "-m", "fastserve_mega", "coordinator", *arguments]
        self._process = subprocess.Popen(
            [*command, "--stop-on-stdin-close"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # a terminal's Ctrl-C reaches it through rank 0 only
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise SaidError(f"the coordinator did not start (exit status {status})")
        addresses = json.loads(line)
        self.worker_endpoint: str = addresses["worker"]
        self.client_endpoint: str = addresses["client"]

    def is_alive(self) -> bool:
        """Whether it runs.

        Raises:
            CoordinatorLostError: it failed; without a text when it has said why on stderr.
        """
        status = self._process.poll()
        if status is None or status == 0:
            return status is None
        killed = f"the coordinator process was killed by signal {-status}"
        raise CoordinatorLostError(killed if status < 0 else "")

    @contextlib.contextmanager
    def watched(self, on_end: Callable[[], None]) -> Iterator[None]:
        """Call `on_end`, in a thread, should it end before the context is left."""
        left = threading.Event()

        def watch() -> None:
            while not left.wait(_WATCH_INTERVAL_S):
                if self._process.poll() is not None:
                    on_end()
                    return

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            left.set()
            thread.join()

    def request_stop(self) -> None:
        """Let it drain; it then tells all ranks to end."""
        self._close_stdin(STOP_WORD)

    def report_loss(self) -> None:
        """Another rank has died: let it say so to its clients and end."""
        self._close_stdin(b"")

    def _close_stdin(self, last_word: bytes) -> None:
        if self._process.stdin and not self._process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(last_word)
                self._process.stdin.close()

    def kill(self) -> None:
        """End it without a word."""
        self._process.kill()
        self._process.wait()

    def join(self) -> int:
        """Wait for its end and return its exit status; kill it when it takes too long."""
        self.request_stop()
        try:
            return self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()
