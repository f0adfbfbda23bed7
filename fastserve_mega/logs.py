"""Logging of a process: for people as text or with colours, for collectors as JSON."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import socket
import sys
from collections import Counter
from datetime import UTC, datetime
from types import TracebackType
from typing import Literal, get_args

LogFormat = Literal["auto", "text", "json", "rich"]
LOG_FORMATS: tuple[LogFormat, ...] = get_args(LogFormat)

_log = logging.getLogger(__name__)
_RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")


def set_up_logging(process: str, *, verbose: bool, log_format: LogFormat = "auto") -> None:
    """Send everything from WARNING (or INFO, when verbose) on to stderr.

    Args:
        process: the command, for example `coordinator`; named in each line.
        verbose: show INFO as well.
        log_format: auto is rich on a terminal and text elsewhere.
    """
    rank = launched_rank() if process == "worker" else None
    if log_format == "auto":
        coloured = sys.stderr.isatty() and importlib.util.find_spec("rich") is not None
        log_format = "rich" if coloured else "text"
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        handlers=[_handler(log_format, process, rank)],
    )
    if log_format == "json":  # and nothing else may reach stderr
        logging.captureWarnings(True)
        sys.excepthook = _log_uncaught


def _log_uncaught(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """What Python would print as a traceback of many lines."""
    if issubclass(kind, Exception):
        _log.critical("uncaught: %s", error, exc_info=(kind, error, traceback))
    else:
        sys.__excepthook__(kind, error, traceback)


def discard_output() -> None:
    """Let what is still to be written to stdout go nowhere, when its reader has gone.

    Python would try it once more at exit, and complain.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


class LogLimiter:
    """Lets one line of a kind through in a while, which tells how many it stands for.

    Args:
        interval_s: between two lines of one kind.
    """

    def __init__(self, interval_s: float = 60.0) -> None:
        self._interval_s = interval_s
        self._due: dict[str, float] = {}
        self._counts: Counter[str] = Counter()

    def count(self, kind: str, now: float) -> int:
        """Count an event; when a line is due, how many there were since the last one, else 0."""
        self._counts[kind] += 1
        if now < self._due.get(kind, now):
            return 0
        self._due[kind] = now + self._interval_s
        return self._counts.pop(kind)


def launched_rank() -> int | None:
    """This process's rank by the environment of its launcher; None for a single process."""
    for name in _RANK_VARIABLES:
        if (value := os.environ.get(name, "")).isdigit():
            return int(value)
    return None


def _handler(log_format: LogFormat, process: str, rank: int | None) -> logging.Handler:
    name = process if rank is None else f"{process} {rank}"
    if log_format == "rich":
        from rich.console import Console
        from rich.logging import RichHandler

        rich = RichHandler(console=Console(stderr=True), show_path=False, rich_tracebacks=False)
        rich.setFormatter(logging.Formatter(f"{name}: %(message)s", "%H:%M:%S"))
        return rich
    handler = logging.StreamHandler(sys.stderr)
    if log_format == "json":
        handler.setFormatter(JsonFormatter(process, rank))
    else:
        text = f"%(asctime)s %(levelname)s {name}: %(message)s"
        handler.setFormatter(logging.Formatter(text))
    return handler


class JsonFormatter(logging.Formatter):
    """One object per line: time (UTC), level, host, process, pid, rank, logger, message."""

    def __init__(self, process: str, rank: int | None) -> None:
        super().__init__()
        self._fixed = {"host": socket.gethostname(), "process": process, "pid": os.getpid()}
        if rank is not None:
            self._fixed["rank"] = rank

    def format(self, record: logging.LogRecord) -> str:
        """The line, with `exception` when there is one."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            **self._fixed,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
