"""Shows how far the loading of the weights is. No torch here."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from fastserve_mega.worker.topology import Topology

_LOG_INTERVAL_S = 5.0

_log = logging.getLogger(__name__)


@contextmanager
def show_loading(
    model_name: str, total_bytes: int, topology: Topology, console: Console | None = None
) -> Iterator[Callable[[int], None]]:
    """Show rank 0's loading: a bar on a terminal, else a line in the log every few seconds.

    Args:
        model_name: to show.
        total_bytes: of this rank's parameters.
        topology: of this rank.
        console: where the bar goes; None is stderr.

    Yields:
        A function to call with the number of bytes that were loaded since the last call.
    """
    begin = time.monotonic()
    if topology.rank != 0:
        yield _ignore
        return
    console = console or Console(stderr=True)
    if console.is_terminal:
        with _bar(model_name, console) as progress:
            task = progress.add_task("", total=total_bytes)
            yield lambda num_bytes: progress.advance(task, num_bytes)
    else:
        yield _Log(model_name, total_bytes).advance
    seconds = time.monotonic() - begin
    rate = total_bytes / max(seconds, 1e-9)
    _log.info(
        "loaded %s: %.3g GB on this rank in %.1f s, %.2g GB/s",
        model_name, total_bytes / 1e9, seconds, rate / 1e9,
    )  # fmt: skip


def _ignore(num_bytes: int) -> None:
    pass


def _bar(model_name: str, console: Console) -> Progress:
    columns = (
        TextColumn(f"loading {model_name}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)


class _Log:
    """A line now and then."""

    def __init__(self, model_name: str, total_bytes: int) -> None:
        self._model_name = model_name
        self._total_bytes = total_bytes
        self._loaded = 0
        self._last_s = time.monotonic()

    def advance(self, num_bytes: int) -> None:
        self._loaded += num_bytes
        now = time.monotonic()
        if now - self._last_s >= _LOG_INTERVAL_S:
            self._last_s = now
            _log.info(
                "loading %s: %.3g of %.3g GB",
                self._model_name, self._loaded / 1e9, self._total_bytes / 1e9,
            )  # fmt: skip
