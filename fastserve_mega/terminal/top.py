"""`fastserve-mega top`: what the scheduler is doing, in a terminal."""

from __future__ import annotations

import sys
import time
from collections import Counter

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from fastserve_mega.client import Client, ServerUnavailableError
from fastserve_mega.messaging.messages import Snapshot
from fastserve_mega.printing import FittedTable
from fastserve_mega.snapshot import PoolView, ReplicaView, RequestView

_STYLES = {"running": "green", "resident": "blue", "swapped": "yellow", "waiting": "bright_black"}
_MARK = "■"
_MARKS_IN_A_WORD = 10
"""So that they can be counted, and wrap."""
_BAR_WIDTH = 20
_ANSWER_S = 3.0


def run_top(endpoint: str, *, interval_s: float, once: bool) -> int:
    """Show snapshots until Ctrl-C; returns the exit status.

    Args:
        endpoint: ZeroMQ address of the coordinator for clients.
        interval_s: between two snapshots.
        once: print one and end; also what happens when the output is not a terminal.
    """
    console = Console()
    try:
        with Client(endpoint, timeout_s=_ANSWER_S) as client:
            before = client.snapshot()
            if once or not console.is_terminal:
                console.print(render(before, before))
            else:
                _watch(client, console, before, interval_s)
    except (ServerUnavailableError, ValueError) as error:
        print(f"fastserve-mega top: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    return 0


def _watch(client: Client, console: Console, before: Snapshot, interval_s: float) -> None:
    with Live(render(before, before), console=console, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(interval_s)
            snapshot = client.snapshot()
            live.update(render(snapshot, before), refresh=True)
            before = snapshot


def render(snapshot: Snapshot, before: Snapshot) -> RenderableType:
    """The whole screen; rates are those since `before`."""
    elapsed_s = snapshot.clock_s - before.clock_s
    parts: list[RenderableType] = [_figures(snapshot, before, elapsed_s)]
    several = len(snapshot.replicas) > 1
    for number, replica in enumerate(snapshot.replicas):
        if several:
            parts.append(Text(f"replica {number}", style="bold"))
        same = number < len(before.replicas)
        parts += [_levels(replica), _pools(replica, before.replicas[number] if same else replica,
                                           elapsed_s)]  # fmt: skip
    legend = Text("  ".join(f"{_MARK} {name}" for name in _STYLES))
    for name, style in _STYLES.items():
        legend.highlight_words([f"{_MARK} {name}"], style)
    return Group(*parts, legend)


def _figures(snapshot: Snapshot, before: Snapshot, elapsed_s: float) -> FittedTable:
    generated = snapshot.generation_tokens - before.generation_tokens
    unfinished = sum(sum(replica.levels) for replica in snapshot.replicas)
    figures = {
        "output tokens/s": f"{generated / elapsed_s:.1f}" if elapsed_s > 0 else "-",
        "TTFT P50, P95": f"{_seconds(snapshot.ttft_s.p50)}, {_seconds(snapshot.ttft_s.p95)}",
        "JCT P50, P95": f"{_seconds(snapshot.jct_s.p50)}, {_seconds(snapshot.jct_s.p95)}",
        "unfinished": f"{unfinished:,}",
        "finished": f"{snapshot.finished_requests:,}",
        "preemptions": f"{sum(replica.preemptions for replica in snapshot.replicas):,}",
    }
    table = FittedTable(*figures, text_columns=0)
    table.add_row(*figures.values())
    return table


def _levels(replica: ReplicaView) -> FittedTable:
    table = FittedTable(
        "level", "quantum", "requests", "the first ones by priority", text_columns=4
    )
    for level, count in enumerate(replica.levels):
        quantum = _seconds(replica.quanta_s[level]) if replica.quanta_s else ""
        name = replica.level_names[level] if replica.level_names else f"Q{level + 1}"
        shown = [view for view in replica.requests if view.level == level]
        table.add_row(name, quantum, f"{count:,}" if count else "", _marks(shown))
    return table


def _marks(requests: list[RequestView]) -> Text:
    counts = Counter("running" if view.running else view.place for view in requests)
    styles = [style for name, style in _STYLES.items() for _ in range(counts[name])]
    marks = Text()
    for number, style in enumerate(styles):
        between = " " if number and number % _MARKS_IN_A_WORD == 0 else ""
        marks.append(f"{between}{_MARK}", style)
    return marks


def _pools(replica: ReplicaView, before: ReplicaView, elapsed_s: float) -> FittedTable:
    table = FittedTable(
        "KV blocks", "in use", "cached", "of", "swapped to it, blocks/s", "share in use"
    )
    for name, pool, now, then in (
        ("device", replica.device, replica.swapped_in_blocks, before.swapped_in_blocks),
        ("host", replica.host, replica.swapped_out_blocks, before.swapped_out_blocks),
    ):
        rate = f"{(now - then) / elapsed_s:.0f}" if elapsed_s > 0 else "-"
        counts = (f"{pool.owned:,}", f"{pool.cached:,}", f"{pool.capacity:,}")
        table.add_row(name, *counts, rate, _bar(pool))
    return table


def _bar(pool: PoolView) -> RenderableType:
    if not pool.capacity:
        return Text("no pool", style="bright_black")
    return ProgressBar(total=pool.capacity, completed=pool.owned, width=_BAR_WIDTH)


def _seconds(seconds: float) -> str:
    if seconds == 0:
        return "-"
    if seconds < 0.01:  # a quantum of a small model is a fraction of a millisecond
        return f"{seconds * 1000:.2g} ms"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
