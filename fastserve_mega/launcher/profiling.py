"""What `fastserve-mega profile` does: start the ranks and let them be measured."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastserve_mega.launcher.processes import (
    KILL_AFTER_S,
    LaunchError,
    end_tree,
    mpirun_files,
    own_command,
    ranks_prefix,
    spawn,
)
from fastserve_mega.system.config import Config


def profile(config: Config, arguments: Sequence[str], output: Path) -> int:
    """`fastserve-mega profile`: start the ranks, let them be measured; returns the exit status."""
    output = output.resolve()
    if not output.parent.is_dir():
        print(f"fastserve-mega profile: no directory {output.parent}", file=sys.stderr)
        return 2
    try:
        prefix = ranks_prefix(config)
    except LaunchError as error:
        print(f"fastserve-mega profile: {error}", file=sys.stderr)
        return 1
    command = [*prefix, *own_command("worker", arguments), "--profile-to", str(output)]
    with mpirun_files() as variables:
        status = _run(command, variables)
    if status == 0:
        print(f"{output} is written; use it with --set scheduler.profile={output}")
    return status


def _run(command: Sequence[str], variables: Mapping[str, str]) -> int:
    ranks = spawn(command, variables=variables)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return ranks.wait()
    except KeyboardInterrupt:
        ranks.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            ranks.wait(KILL_AFTER_S)
        return 1
    finally:
        end_tree(ranks)
