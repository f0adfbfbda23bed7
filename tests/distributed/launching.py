"""Starts ranks the way users do, and watches how they end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
OPEN_MPI = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
OUR_LINES = re.compile(r"^(ERROR|WARNING|CRITICAL) \w+: |^Traceback|^\w*Error: ")
TIME_AND_RANK = re.compile(r"^[\d-]{10} [\d:,]{12} (ERROR|WARNING|CRITICAL) (\w+)( \d+)?: ")


def environment(**changes: str) -> dict[str, str]:
    """As in a shell of the user, without what a launcher around the tests has set."""
    foreign = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "OMPI_", "PMI", "SLURM_", "TORCHELASTIC")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    path = f"{BIN}{os.pathsep}{kept['PATH']}"
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}


def worker(config: Path, *arguments: str) -> list[str]:
    return ["-m", "fastserve_mega", "worker", "--config", str(config), *arguments]


def write_config(path: Path, model: Path, **sections: Mapping[str, object]) -> Path:
    """Two stages of a tiny model, and short limits."""
    plain = {
        "model": {"path": str(model), "dtype": "float32"},
        "parallel": {"pipeline": 2, "device": "cpu", "threads_per_rank": 1, "timeout_s": 60},
        "kv_cache": {"block_size": 4, "device_blocks": 80, "host_blocks": 0},
        "coordinator": {"client_endpoint": "tcp://127.0.0.1:0", "startup_timeout_s": 180},
    }
    for name, values in sections.items():
        plain.setdefault(name, {}).update(values)
    path.write_text(yaml.safe_dump(plain))
    return path


@dataclass
class Ended:
    """A launch that is over."""

    status: int
    output: str
    seconds: float

    @property
    def sentences(self) -> list[str]:
        """What our processes said, without time, rank and the launcher's own words."""
        lines = [TIME_AND_RANK.sub(r"\1 \2: ", line) for line in self.output.splitlines()]
        return [line for line in lines if OUR_LINES.match(line)]


class Launch:
    """A launcher and all it starts, in a process group of their own. A context manager."""

    def __init__(self, command: Sequence[str], log: Path, **variables: str) -> None:
        self._log = log
        self._begin = time.monotonic()
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                env=environment(**variables),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def wait(self, limit_s: float) -> Ended:
        """Its end; a launch that does not end in time fails the test."""
        try:
            status = self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {limit_s} s:\n{self.output}") from None
        return Ended(status, self.output, time.monotonic() - self._begin)


def launch_and_wait(command: Sequence[str], log: Path, limit_s: float, **variables: str) -> Ended:
    with Launch(command, log, **variables) as launch:
        return launch.wait(limit_s)
