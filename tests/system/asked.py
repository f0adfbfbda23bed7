"""Figures beside what was asked of them, as the last thing that a long run prints."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Figure:
    """One that must not be larger than was asked."""

    what: str
    reached: float
    asked: float

    @property
    def holds(self) -> bool:
        return self.reached <= self.asked


def tell(figures: list[Figure]) -> bool:
    """Print a table; returns whether all hold."""
    table = Table("", "asked", "reached", "holds")
    for each in figures:
        holds = "yes" if each.holds else "NO"
        table.add_row(each.what, f"≤ {each.asked:g}", f"{each.reached:.3g}", holds)
    Console(width=100).print(table)
    return all(each.holds for each in figures)
