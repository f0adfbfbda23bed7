"""How much memory this host has, as its ranks and `doctor` see it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")


class HostMemory(NamedTuple):
    """Bytes, within the limits of the process' control group."""

    total: int
    available: int
    """What new pages can take."""


def host_memory() -> HostMemory | None:
    """The memory of this host; None where the system does not tell."""
    try:
        lines = (_PROC / "meminfo").read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        total, available = (
            int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable")
        )
    except (OSError, KeyError, ValueError):
        return None
    within = [HostMemory(total, available), *_groups()]
    return HostMemory(min(each.total for each in within), min(each.available for each in within))


def _groups() -> list[HostMemory]:
    """What the limits of this process' group and of those above it leave (cgroup version 2)."""
    try:
        lines = (_PROC / "self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    own = next((line[3:] for line in lines if line.startswith("0::")), None)
    if own is None:
        return []
    levels = (Path(own), *Path(own).parents)
    found = (_group(_CGROUPS / level.relative_to("/")) for level in levels)
    return [each for each in found if each is not None]


def _group(directory: Path) -> HostMemory | None:
    try:
        limit = (directory / "memory.max").read_text(encoding="ascii").strip()
        used = int((directory / "memory.current").read_text(encoding="ascii"))
        statistics = (directory / "memory.stat").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    # Pages of files that were read, which the kernel gives up first.
    reclaimable = int(statistics[statistics.index("inactive_file") + 1])
    return HostMemory(int(limit), max(int(limit) - used + reclaimable, 0))
