"""How much memory a host has left, and whether its ranks fit. No torch here."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

_GB = 2**30
_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")

_log = logging.getLogger(__name__)


def available_bytes() -> int | None:
    """Memory that new pages can take, within the limits of the process' control group.

    None where the system does not tell.
    """
    try:
        lines = (_PROC / "meminfo").read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    return min([available, *_left_in_groups()])


def check_host_memory(
    needs: Mapping[str, int], ranks: int, available: int | None, *, is_final: bool = True
) -> None:
    """Refuse to allocate what the host does not have.

    Args:
        needs: bytes of one rank by what they are for.
        ranks: of this host, which need as much each.
        available: when none of them had allocated anything; None: not known.
        is_final: False warns only, for memory that is page-locked as it is allocated: the system
            knows better, since a virtual machine may get more while it takes it.

    Raises:
        ValueError: it is too little.
    """
    total = ranks * sum(needs.values())
    if available is None or total <= available:
        return
    parts = ", ".join(f"{size / _GB:.2f} for {what}" for what, size in needs.items() if size)
    each = "the rank" if ranks == 1 else f"each of its {ranks} ranks"
    message = (
        f"the host has {available / _GB:.2f} GB of memory left, but {total / _GB:.2f} GB are "
        f"needed: {each} takes {parts}"
    )
    if is_final:
        raise ValueError(message)
    _log.warning("%s", message)


def _left_in_groups() -> list[int]:
    """What the limits of this process' group and of those above it leave (cgroup version 2)."""
    try:
        lines = (_PROC / "self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    own = next((line[3:] for line in lines if line.startswith("0::")), None)
    if own is None:
        return []
    group, found = Path(own), []
    for level in (group, *group.parents):
        left = _left_in_group(_CGROUPS / level.relative_to("/"))
        if left is not None:
            found.append(left)
    return found


def _left_in_group(directory: Path) -> int | None:
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
    return max(int(limit) - used + reclaimable, 0)
