"""A bar on a terminal, lines in the log elsewhere, nothing on the other ranks."""

from __future__ import annotations

import io
import itertools
import logging

import pytest
from rich.console import Console

from fastserve_mega.worker import loading_progress
from fastserve_mega.worker.loading_progress import show_progress


@pytest.fixture
def clock(monkeypatch):
    """Two seconds pass between any two looks."""
    ticks = itertools.count(0, 2)
    monkeypatch.setattr(loading_progress.time, "monotonic", lambda: float(next(ticks)))


def test_a_bar_on_a_terminal():
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120)
    with show_progress("loading some/model", 4_000_000, console=console) as report:
        report(1_000_000)
        report(3_000_000)
    assert "loading some/model" in text.getvalue()
    assert "4.0/4.0 MB" in text.getvalue()


@pytest.mark.usefixtures("clock")
def test_lines_elsewhere(caplog):
    console = Console(file=io.StringIO(), force_terminal=False)
    with (
        caplog.at_level(logging.INFO),
        show_progress("loading m", 4_000_000_000, console=console) as report,
    ):
        for _ in range(4):
            report(1_000_000_000)
    assert console.file.getvalue() == ""
    first, last = [record.getMessage() for record in caplog.records]
    assert first == "loading m: 3 of 4 GB"
    assert last.startswith("loading m: 4 GB in 1")
    assert last.endswith("GB/s")


def test_nothing_on_other_ranks(caplog):
    text = io.StringIO()
    console = Console(file=text, force_terminal=True)
    with (
        caplog.at_level(logging.INFO),
        show_progress("loading m", 4, shown=False, console=console) as report,
    ):
        report(4)
    assert text.getvalue() == ""
    assert not caplog.records
