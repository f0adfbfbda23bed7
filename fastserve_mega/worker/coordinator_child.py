"""Rank 0's handle on the coordinator process it starts."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Sequence

from fastserve_mega.messaging.messages import STOP_WORD

_END_TIMEOUT_S = 30.0


class CoordinatorChild:
    """A child process; it ends when its stdin closes, so it cannot outlive rank 0."""

    def __init__(self, arguments: Sequence[str]) -> None:
        """Start it and read the address it prints.

        Args:
            arguments: of `fastserve-mega coordinator`.

        Raises:
            ValueError: it ended at once; it has said why on stderr.
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
            raise ValueError(f"the coordinator did not start (exit status {status}), see above")
        self.worker_endpoint: str = json.loads(line)["worker"]

    def is_alive(self) -> bool:
        return self._process.poll() is None

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

    def join(self) -> int:
        """Wait for its end and return its exit status; kill it when it takes too long."""
        self.request_stop()
        try:
            return self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()
