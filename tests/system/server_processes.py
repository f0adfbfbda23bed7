"""The processes of a deployment as Linux shows them in /proc."""

from __future__ import annotations

import os
from pathlib import Path

PROC = Path("/proc")


def resident_bytes(ancestor: int, proc: Path = PROC) -> dict[str, int]:
    """Resident memory of all live processes below `ancestor`, by name and process id."""
    parents: dict[int, int] = {}
    for directory in proc.iterdir():
        if directory.name.isdigit() and (parent := _parent(directory)) is not None:
            parents[int(directory.name)] = parent
    found = {}
    for process_id in sorted(_below(ancestor, parents)):
        directory = proc / str(process_id)
        try:
            pages = int((directory / "statm").read_text().split()[1])
            name = _name(directory)
        except OSError:
            continue  # it has just ended
        found[f"{name} {process_id}"] = pages * os.sysconf("SC_PAGE_SIZE")
    return found


def _parent(directory: Path) -> int | None:
    """Process id of the parent; None for one that has ended."""
    try:
        # The name in parentheses may contain spaces and parentheses.
        state, parent = (directory / "stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return None
    return None if state == "Z" else int(parent)


def _below(ancestor: int, parents: dict[int, int]) -> set[int]:
    below: set[int] = set()
    newest = {ancestor}
    while newest:
        newest = {child for child, parent in parents.items() if parent in newest}
        below |= newest
    return below


def _name(directory: Path) -> str:
    """The subcommand of `python -m fastserve_mega`, else the name of the program."""
    words = (directory / "cmdline").read_text().split("\0")
    if "fastserve_mega" in words:
        return words[words.index("fastserve_mega") + 1]
    return (directory / "comm").read_text().strip()
