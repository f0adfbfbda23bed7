"""A program that a launcher has started as every rank: the first goes on, the others compute."""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Literal

from fastserve_mega.launcher import LaunchError
from fastserve_mega.system.config import Config
from fastserve_mega.worker.rank import run_worker
from fastserve_mega.worker.topology import find_launcher

_END_S = 60.0


def is_launched() -> bool:
    """Whether mpirun, srun or torchrun has started this program as one of several ranks."""
    launcher = find_launcher(os.environ)
    return launcher is not None and int(os.environ.get(launcher.world_size, "1")) > 1


class LaunchedRank:
    """The first rank, on a thread beside the program; the other ranks do not get that far.

    Args:
        config: the same on all ranks; its coordinator listens for clients at a free port.
        arguments: --config and --set arguments that give the coordinator the same configuration.
        runner: of the ranks.

    Raises:
        LaunchError: the ranks did not start.
        SystemExit: on all other ranks, when the first one has ended.
    """

    def __init__(
        self,
        config: Config,
        arguments: Sequence[str],
        runner: Literal["megatron", "fake"] = "megatron",
    ) -> None:
        launcher = find_launcher(os.environ)
        if launcher is None or os.environ[launcher.rank] != "0":
            sys.exit(run_worker(config, arguments, runner))
        ready: queue.Queue[tuple[str, Callable[[], None]] | int] = queue.Queue()

        def be_rank() -> None:
            status = 1
            try:
                status = run_worker(
                    config, arguments, runner, on_ready=lambda *found: ready.put(found)
                )
            finally:
                ready.put(status)

        self._thread = threading.Thread(target=be_rank, daemon=True, name="rank 0")
        self._thread.start()
        found = ready.get()  # the ranks' own time limits end this
        if isinstance(found, int):
            raise LaunchError(f"the ranks ended with status {found}")
        self.endpoint, self._stop = found

    def close(self) -> None:
        """End all ranks."""
        self._stop()
        self._thread.join(_END_S)
