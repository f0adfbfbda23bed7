"""The commands of the docs, as a reader pastes them; what takes long at a smaller size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from documented import ROOT, whole

from fastserve_mega.coordinator.profile_file import save_profile
from fastserve_mega.scheduling.cost_model import DecodePoint, PrefillPoint, Profile

FEW = "--set workload.num_requests=8 --set workload.warmup_requests=0"
ONE_RUN = "--pipeline 1 --prefix-cache on --strategies proactive"
QUICK = {
    "fastserve-mega api-key alice": "",
    "fastserve-mega keygen": "",
    "fastserve-mega plan": "",
    "fastserve-mega simulate --config configs/opt-13b-a100.yaml": f"--rates 1 {FEW}",
    "fastserve-mega simulate": FEW,
    "fastserve-mega compare-policies": "--workloads bimodal --loads 0.7 --seeds 1 --policies fcfs",
    "python -m fastserve_mega.experiments.background": "--requests 4 --loads 0.3",
    "python -m fastserve_mega.experiments.fairness": "--requests 4",
    "python tools/bench_coordinator.py": "--replicas 1 --batch 2 --steps 2",
    "python tools/bench_scheduler.py": "--queued 8 --batch 4 --steps 4",
}
"""Beginnings of commands, each with what is added to make it short."""
SLOW = {
    "fastserve-mega profile": "",
    "python -m fastserve_mega.experiments.live_vs_simulated": "--requests 4",
    "python -m fastserve_mega.experiments.paper": "--quick",
    "python -m fastserve_mega.experiments.steady_state": "--quick",
    "python -m fastserve_mega.experiments.placement": "--workloads documents --requests 4",
    "python -m tests.system.beside_a_batch": "--requests 4",
    "python -m tests.system.check_swapping": f"--requests 4 --tokens 4 {ONE_RUN}",
    "python -m tests.system.soak": "--minutes 0.2",
    "python tools/bench_step.py": "--rounds 1 --steps 1",
    "python tools/measure_loading.py": "--gigabytes 0.1",
    "python tools/measure_quantization.py": "--windows 1 --length 8",
}
ELSEWHERE = {
    "fastserve-mega api-server": "tests/process/test_serve.py",
    "fastserve-mega batch": "tests/process/test_batch_jobs.py",
    "fastserve-mega bench": "test_readme.py",
    "fastserve-mega drill": "tests/process/test_drill.py",
    "fastserve-mega serve": "test_readme.py",
    "fastserve-mega top": "test_readme.py",
    "python -m pytest": "is tests itself",
    "python -m tests.system.crowd": "fails where other work takes the cores",
    "python -m tests.system.fuzz": "the same; tests/process/test_fuzz.py",
    "python -m tests.system.overload": "the same; tests/unit/test_overload.py",
    "python tools/trace_request.py": "tests/process/test_trace_request.py",
    "python tools/compare_servers.py": "needs vLLM; tests/unit/test_compare_servers.py",
}
"""Commands that are run by other tests, or cannot be here."""
MINUTES = 9
LINES = sorted({line for _, line in whole(r"fastserve-mega \S+ \S|python ")})


def of(table: dict[str, str], line: str) -> str | None:
    """The beginning of the command that is in the table."""
    return next((start for start in table if f"{line} ".startswith(f"{start} ")), None)


def chosen(table: dict[str, str]) -> list[str]:
    lines = [(line, of(table, line)) for line in LINES]
    return [f"{line} {table[start]}".strip() for line, start in lines if start is not None]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A directory that looks like a clone, to which commands may write, in a home of its own."""
    home = tmp_path_factory.mktemp("home")
    (home / ".cache").symlink_to(Path("~/.cache").expanduser())
    clone = home / "clone"
    clone.mkdir()
    for name in ("configs", "fastserve_mega", "tests", "tools"):
        (clone / name).symlink_to(ROOT / name)
    page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    (clone / "deployment.yaml").write_text(page.partition("```yaml\n")[2].partition("```")[0])
    (clone / "architectures").symlink_to(ROOT / "configs" / "architectures")
    profile = Profile((PrefillPoint(1, 0.01),), (DecodePoint(1, 16, 0.01),))
    save_profile(profile, clone / "profile.json")
    return clone


def run(line: str, clone: Path) -> None:
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = {
        **os.environ,
        "PATH": os.pathsep.join(paths),
        "PYTHONPATH": str(ROOT),
        "HOME": str(clone.parent),
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line], check=False, cwd=clone, env=environment,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60 * MINUTES,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_every_command_is_run_or_it_is_said_why_not():
    assert [line for line in LINES if of(QUICK | SLOW | ELSEWHERE, line) is None] == []


@pytest.mark.parametrize("line", chosen(QUICK))
def test_a_short_command_works(line, clone):
    run(line, clone)


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.distributed
@pytest.mark.parametrize("line", chosen(SLOW))
def test_a_long_command_works(line, clone, model_directory):
    run(line, clone)
