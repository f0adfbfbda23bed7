"""The drill of `fastserve-mega drill`, with ranks that compute nothing."""

from __future__ import annotations

import sys
from multiprocessing import shared_memory
from pathlib import Path

import pytest

from fastserve_mega import cli
from fastserve_mega.drill import rounds
from fastserve_mega.drill.processes import Victim, abandoned_memory, victims
from fastserve_mega.drill.rounds import Tally

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(sys.platform != "linux", reason="/proc and prctl are Linux's"),
]


@pytest.fixture
def config(model_directory, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        f"model: {{path: {model_directory}}}\n"
        "parallel: {pipeline: 2, device: cpu}\n"
        "kv_cache: {device_blocks: 2000}\n"
        "supervisor: {hang_limit_s: 3}\n"
    )
    return path


def run(config, *words: str) -> int:
    return cli.main(["drill", "--config", str(config), "--runner", "fake", *words])


def rows(printed: str) -> list[list[str]]:
    """The cells of a table, without its head."""
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_nothing_is_lost_with_a_rank_or_an_http_server(config, capfd, monkeypatch):
    monkeypatch.setattr(rounds, "SETTLED_S", 0.0)
    names = ("rank 1", "api-server")
    words = [word for name in names for word in ("--only", name)]
    assert run(config, "--streams", "4", "--tokens", "60", *words) == 0
    found = rows(capfd.readouterr().out)
    assert [row[:6] for row in found] == [
        [name, number, "1", "4", "0", "0"] for number in ("SIGKILL", "SIGSTOP") for name in names
    ]
    assert [row[8:] for row in found] == [["0", "0", "0"]] * 4


@pytest.mark.slow
def test_nothing_is_lost_under_many_streams(config, capfd):
    assert run(config, "--streams", "32", "--tokens", "80", "--rounds", "2") == 0
    assert len(rows(capfd.readouterr().out)) == len(victims(2)) == 10


@pytest.mark.slow
def test_a_drill_that_could_not_see_a_wrong_token_would_prove_nothing(config, capfd, monkeypatch):
    """Each start leaves out the copies to the host and back, so that KV is lost."""
    monkeypatch.setenv("FASTSERVE_MEGA_FAULTS", "rank.copy:drop,rank.before_step:delay=0.02")
    small = ["--set", "kv_cache.device_blocks=30", "--set", "scheduler.mlfq.base_quantum_s=0.01"]
    words = ["--streams", "8", "--tokens", "100", "--only", "rank 1", *small]
    assert run(config, *words) == 1
    assert sum(int(row[5]) for row in rows(capfd.readouterr().out)) > 0


def test_names_of_no_process_are_told(config, capfd):
    assert run(config, "--only", "rank 7") == 2
    assert "api-server, coordinator, mpirun, rank 0, rank 1" in capfd.readouterr().err


@pytest.mark.parametrize("field", ["lost", "wrong", "orphans", "ports_left", "memory_left"])
def test_each_kind_of_damage_counts(field):
    tally = Tally(Victim("rank 0", 9))
    assert tally.is_clean
    setattr(tally, field, 1)
    assert not tally.is_clean


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm")
def test_shared_memory_is_abandoned_when_nobody_has_it_mapped():
    shared = shared_memory.SharedMemory(create=True, size=1)
    try:
        assert shared.name not in abandoned_memory()
        shared.close()
        assert shared.name in abandoned_memory()
    finally:
        shared.unlink()
