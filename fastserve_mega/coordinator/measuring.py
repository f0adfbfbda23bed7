"""`fastserve-mega profile`: the whole grid, with a progress bar on stderr."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fastserve_mega.coordinator.profiler import Profiler
from fastserve_mega.scheduling.cost_model import Profile


def measure(profiler: Profiler, look_around: Callable[[], None]) -> Profile:
    """Measure.

    Args:
        profiler: of the ranks.
        look_around: called after each step; may raise to end it all.
    """
    columns = (TextColumn("measuring steps"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=None)

        def show(made: int, count: int) -> None:
            progress.update(task, completed=made, total=count)
            look_around()

        return profiler.grid(show)
