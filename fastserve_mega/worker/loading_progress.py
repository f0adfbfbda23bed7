"""Shows how far the loading or converting of weights is. No torch here."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_LOG_INTERVAL_S = 5.0

_log = logging.getLogger(__name__)


@contextmanager
def show_progress(
    action: str, total_bytes: int, *, shown: bool = True, console: Console | None = None
) -> Iterator[Callable[[int], None]]:
    """Show how many bytes are done: a bar on a terminal, else a line in the log now and then.

    Args:
        action: what is being done, for example "loading Llama-3".
        total_bytes: when it is done.
        shown: on one of several ranks only.
        console: where the bar goes; None is stderr.

    Yields:
        A function to call with the number of bytes since the last call.
    """
    if not shown:
        yield _ignore
        return
    begin = time.monotonic()
    if console is None and sys.stderr.isatty():
        from rich.console import Console  # every start waits for it, also where nobody looks

        console = Console(stderr=True)
    if console is not None and console.is_terminal:
        with _bar(action, console) as progress:
            task = progress.add_task("", total=total_bytes)
            yield lambda num_bytes: progress.advance(task, num_bytes)
    else:
        yield _Log(action, total_bytes).advance
    seconds = max(time.monotonic() - begin, 1e-9)
    gigabytes = total_bytes / 1e9
    _log.info("%s: %.3g GB in %.1f s, %.2g GB/s", action, gigabytes, seconds, gigabytes / seconds)


def _ignore(num_bytes: int) -> None:
    pass


def _bar(action: str, console: Console) -> Progress:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn(action, markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)


class _Log:
    """A line now and then."""

    def __init__(self, action: str, total_bytes: int) -> None:
        self._action = action
        self._total_bytes = total_bytes
        self._loaded = 0
        self._last_s = time.monotonic()

    def advance(self, num_bytes: int) -> None:
        self._loaded += num_bytes
        now = time.monotonic()
        if now - self._last_s >= _LOG_INTERVAL_S:
            self._last_s = now
            done, total = self._loaded / 1e9, self._total_bytes / 1e9
            _log.info("%s: %.3g of %.3g GB", self._action, done, total)
