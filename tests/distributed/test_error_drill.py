"""What goes wrong at start: one sentence, from one rank, in seconds, and all ranks end."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from launching import (
    BIN,
    OPEN_MPI,
    Ended,
    Launch,
    launch_and_wait,
    worker,
    write_config,
)
from tiny_models import make_model

pytestmark = pytest.mark.distributed

LIMIT_S = 180
"""Of this machine when everything else runs as well; docs/deployment.md has the usual times."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    make_model("llama", directory)
    (directory / "tokenizer.json").touch()  # no test here comes so far as to read it
    return directory


@pytest.fixture
def config(model, tmp_path):
    return write_config(tmp_path / "config.yaml", model)


@pytest.fixture
def port():
    """Taken by somebody else for as long as the test runs."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def mpirun(ranks: int, *arguments: str) -> list[str]:
    return [*OPEN_MPI, "-n", str(ranks), sys.executable, *arguments]


def torchrun(*arguments: str) -> list[str]:
    return [str(BIN / "torchrun"), "--nproc-per-node", "2", *arguments]


def by_hand(config: Path, tmp_path: Path, ranks: list[int], **variables: str) -> list[Launch]:
    """What srun does, without one that kills the others: RANK and the store's address."""
    command = [sys.executable, *worker(config, "--runner", "fake", "--verbose")]
    return [
        Launch(
            command,
            tmp_path / f"rank-{rank}",
            **{"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), **variables},
        )
        for rank in ranks
    ]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def assert_said(ended: Ended, *words: str) -> None:
    """One sentence of ours with these words, no traceback, a status that is not 0."""
    print(f"{ended.seconds:.1f} s: {ended.sentences}")
    assert ended.status != 0
    assert len(ended.sentences) == 1, ended.output
    for word in words:
        assert word in ended.sentences[0]


@pytest.mark.parametrize(
    ("ranks", "changes", "words"),
    [
        (3, [], ["wants 2 ranks", "the launcher started 3"]),
        (
            2,
            ["--set", "parallel.pipeline=1", "--set", "parallel.tensor=8"],
            ["wants 8 ranks", "the launcher started 2"],
        ),
        (3, ["--set", "parallel.pipeline=1", "--set", "parallel.tensor=3"], ["4 attention heads"]),
    ],
    ids=["too many ranks", "too few ranks", "heads"],
)
def test_what_cannot_be_split(config, tmp_path, ranks, changes, words):
    command = mpirun(ranks, *worker(config, "--runner", "fake", *changes))
    assert_said(launch_and_wait(command, tmp_path / "log", LIMIT_S), *words)


def test_ranks_with_different_configurations(config, tmp_path):
    first = ["-n", "1", sys.executable, *worker(config, "--runner", "fake")]
    second = [*first, "--set", "scheduler.max_batch_size=3"]
    ended = launch_and_wait([*OPEN_MPI, *first, ":", *second], tmp_path / "log", LIMIT_S)
    assert_said(ended, "ranks [1] have another scheduler.max_batch_size than rank 0")


def test_ranks_with_different_versions(config, tmp_path):
    first = ["-n", "1", sys.executable, *worker(config, "--runner", "fake")]
    newer = (
        "import fastserve_mega as f; f.__version__ = '9.9'; from fastserve_mega.cli import main; "
    )
    newer += "raise SystemExit(main())"
    second = ["-n", "1", sys.executable, "-c", newer, *first[5:]]
    ended = launch_and_wait([*OPEN_MPI, *first, ":", *second], tmp_path / "log", LIMIT_S)
    assert_said(ended, "ranks [1] run fastserve_mega 9.9, rank 0 runs ")


def test_client_port_in_use(config, tmp_path, port):
    endpoint = f"coordinator.client_endpoint=tcp://127.0.0.1:{port}"
    command = mpirun(2, *worker(config, "--runner", "fake", "--set", endpoint))
    ended = launch_and_wait(command, tmp_path / "log", LIMIT_S)
    assert_said(ended, f"cannot listen on tcp://127.0.0.1:{port}: Address already in use")


def test_master_port_in_use_with_mpi(config, tmp_path, port):
    command = mpirun(2, *worker(config, "--runner", "fake"))
    ended = launch_and_wait(command, tmp_path / "log", LIMIT_S, MASTER_PORT=str(port))
    assert_said(ended, f"MASTER_PORT {port} of 127.0.0.1", "in use")


def test_http_port_in_use(config, tmp_path, port):
    command = [sys.executable, "-m", "fastserve_mega", "serve", "--config", str(config)]
    command += ["--set", f"server.port={port}"]
    ended = launch_and_wait(command, tmp_path / "log", LIMIT_S)
    assert ended.status != 0
    starting, *said = ended.output.splitlines()
    assert starting.startswith("starting ")
    assert len(said) == 1
    assert_said(ended, f"cannot listen on 127.0.0.1:{port} (server.host, server.port): Address")


def with_runner(statement: str, config: Path) -> list[str]:
    """A rank for mpirun in which this happens instead of loading the model."""
    code = "import os, fastserve_mega.worker.rank as worker_rank\n"
    code += f"def make(*_):\n    {statement}\n"
    code += "worker_rank._Rank._make_runner = make\n"
    code += "from fastserve_mega.cli import main\nraise SystemExit(main())\n"
    return ["-n", "1", sys.executable, "-c", code, *worker(config)[2:]]


def test_the_same_trouble_of_all_ranks_is_said_once(config, tmp_path):
    rank = with_runner("raise ValueError(f'no room {os.getpid()}')", config)
    command = [*OPEN_MPI, *rank, ":", *rank]
    ended = launch_and_wait(command, tmp_path / "log", LIMIT_S)
    assert_said(ended, "ERROR worker: no room")


def test_trouble_of_one_rank_while_another_is_loading(config, tmp_path):
    busy = with_runner("__import__('time').sleep(1000)", config)
    failing = with_runner("raise ValueError('no room')", config)
    ended = launch_and_wait([*OPEN_MPI, *busy, ":", *failing], tmp_path / "log", LIMIT_S)
    assert_said(ended, "ERROR worker: rank 1: no room")


def test_a_rank_that_dies_while_loading(config, tmp_path):
    busy = with_runner("__import__('time').sleep(1000)", config)
    dying = with_runner("os.kill(os.getpid(), 9)", config)
    ended = launch_and_wait([*OPEN_MPI, *busy, ":", *dying], tmp_path / "log", LIMIT_S)
    print(f"{ended.seconds:.1f} s: {ended.sentences}")
    assert ended.status != 0
    assert "signal 9" in ended.output  # mpirun's own words
    assert ended.sentences == []


def test_a_checkpoint_cut_short(model, tmp_path):
    """With the real runner."""
    directory = tmp_path / "model"
    shutil.copytree(model, directory)
    whole = directory / "model.safetensors"
    os.truncate(whole, whole.stat().st_size // 2)
    config = write_config(tmp_path / "config.yaml", directory)
    ended = launch_and_wait(mpirun(2, *worker(config)), tmp_path / "log", LIMIT_S)
    assert_said(ended, "model.safetensors")


def test_a_rank_that_is_killed_without_a_launcher_that_notices(config, tmp_path):
    """As on another host under torchrun: the coordinator says so, and the others end."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    first, second = by_hand(config, tmp_path, [0, 1], **where)
    with first, second:
        await_line(first, "serving")
        begin = time.monotonic()
        second.process.send_signal(signal.SIGKILL)
        ended = first.wait(LIMIT_S)
        print(f"{time.monotonic() - begin:.1f} s: {ended.sentences}")
    assert_said(ended, "rank 1 has gone")


def await_line(launch: Launch, word: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while word not in launch.output:
        assert launch.process.poll() is None, launch.output
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_missing_host(config, tmp_path):
    """One of two ranks never comes."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    limit = write_config(tmp_path / "short.yaml", Path("/"), parallel={"timeout_s": 2})
    (alone,) = by_hand(limit, tmp_path, [0], **where)
    with alone:
        assert_said(alone.wait(LIMIT_S), "ranks [1] of 2 have not come within 2 s")


def test_missing_store(tmp_path):
    """Nobody is at MASTER_ADDR:MASTER_PORT."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    limit = write_config(tmp_path / "short.yaml", Path("/"), parallel={"timeout_s": 2})
    (alone,) = by_hand(limit, tmp_path, [1], **{**where, "LOCAL_RANK": "0"})
    with alone:
        assert_said(alone.wait(LIMIT_S), f"nobody answers at 127.0.0.1:{where['MASTER_PORT']}")


def test_master_port_in_use_without_mpi(config, tmp_path, port):
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    (first,) = by_hand(config, tmp_path, [0], **where)
    with first:
        assert_said(first.wait(LIMIT_S), f"MASTER_PORT {port} is in use")


def test_torchrun_ends_all_of_them(config, tmp_path):
    command = torchrun(*worker(config, "--runner", "fake", "--set", "parallel.pipeline=3"))
    ended = launch_and_wait(command, tmp_path / "log", LIMIT_S)
    ours = [line for line in ended.sentences if line.startswith("ERROR worker")]
    print(f"{ended.seconds:.1f} s: {ours}")
    assert ended.status != 0
    assert len(ours) == 1
    assert "the launcher started 2" in ours[0]
