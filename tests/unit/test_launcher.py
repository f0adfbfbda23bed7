"""What the launcher starts, where, and that its children do not outlive it, nor their children."""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import zmq

from fastserve_mega.launcher import temporary
from fastserve_mega.launcher.deployment import Deployment
from fastserve_mega.launcher.processes import LaunchError, mpirun_command, mpirun_files
from fastserve_mega.system.config import Config, CoordinatorConfig, ModelConfig

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="prctl and /proc are Linux's")

START_A_CHILD = """
import signal
from fastserve_mega.launcher.processes import spawn
spawn(["sleep", "1000"])
print("started", flush=True)
signal.pause()
"""

# A child in a session of its own whose parent is killed, as a rank's is with mpirun.
LEAVE_AN_ORPHAN = """
import os, subprocess, sys
from fastserve_mega import process_tree
process_tree.adopt_orphans()
parent = subprocess.Popen(
    [sys.executable, "-c", '''
import signal, subprocess
print(subprocess.Popen(["sleep", "1000"], start_new_session=True).pid, flush=True)
signal.pause()
'''],
    stdout=subprocess.PIPE,
)
kept = subprocess.Popen(["sleep", "1000"])
orphan = int(parent.stdout.readline())
parent.kill()
parent.wait()
assert process_tree.descendants(os.getpid()) == {orphan, kept.pid}
process_tree.end_descendants(keep=[kept.pid])
assert not process_tree.is_running(orphan)
assert process_tree.descendants(os.getpid()) == {kept.pid}
process_tree.end_descendants()
assert process_tree.descendants(os.getpid()) == set()
print("done")
"""

# What ends by itself within the grace is not killed, and can say something.
END_BY_ITSELF = r"""
import subprocess
from fastserve_mega import process_tree
process_tree.adopt_orphans()
child = subprocess.Popen(
    ["sh", "-c", "read word; echo $word"], stdin=subprocess.PIPE, bufsize=0
)
child.stdin.write(b"bye\n")
process_tree.end_descendants(grace_s=60)
"""


@linux_only
@pytest.mark.timeout(60)
def test_a_child_ends_when_the_launcher_is_killed_outright():
    launcher = subprocess.Popen([sys.executable, "-c", START_A_CHILD], stdout=subprocess.PIPE)
    assert launcher.stdout is not None
    with launcher:
        assert launcher.stdout.readline() == b"started\n"
        launcher.kill()
        # The child has the same pipe, so its end is the end of the stream.
        assert launcher.stdout.read() == b""


@linux_only
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("program", "said"), [(LEAVE_AN_ORPHAN, "done\n"), (END_BY_ITSELF, "bye\n")]
)
def test_what_a_killed_child_leaves_behind_is_found_and_ended(program, said):
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False
    )
    assert (ended.stdout, ended.stderr, ended.returncode) == (said, "", 0)


# `exec` keeps the process id, after which mpirun names its directory.
START_WHERE_A_KILLED_MPIRUN_HAD_THE_SAME_ID = """
mkdir "$TMPDIR/ompi.$$"
touch "$TMPDIR/ompi.$$/pmix.$HOST.tool"
exec "$@"
"""


@linux_only
@pytest.mark.distributed
def test_mpirun_starts_though_a_killed_one_with_its_process_id_has_left_files(tmp_path):
    script = ["sh", "-c", START_WHERE_A_KILLED_MPIRUN_HAD_THE_SAME_ID, "sh"]
    host = socket.gethostname().partition(".")[0]
    with mpirun_files() as variables:
        ended = subprocess.run(
            [*script, *mpirun_command(1), "echo", "hello"],
            env={**os.environ, "TMPDIR": str(tmp_path), "HOST": host, **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (ended.stdout, ended.returncode) == ("hello\n", 0), ended.stderr
        directory = variables["OMPI_MCA_btl_sm_backing_directory"]
        assert os.path.isdir(directory)
    assert not os.path.exists(directory)


def test_mpirun_starts_where_no_variable_says_whose_home_it_is(monkeypatch):
    monkeypatch.delenv("HOME")
    with mpirun_files() as variables:
        ended = subprocess.run(
            [*mpirun_command(1), "echo", "hello"],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            check=False,
        )
    assert (ended.stdout, ended.returncode) == ("hello\n", 0), ended.stderr


def test_a_socket_lies_where_its_path_is_short_enough(tmp_path, monkeypatch):
    for name, is_used in (("a", True), ("日" * 40, False)):
        directory = tmp_path / name
        directory.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(directory))
        with temporary._own_directory() as own:
            assert (Path(own).parent == directory) == is_used
            assert len(os.fsencode(f"{own}/{temporary._SOCKET}")) <= zmq.IPC_PATH_MAX_LEN


def test_an_address_that_is_none_is_told_before_anything_is_started():
    settings = CoordinatorConfig(client_endpoint="nowhere")
    config = Config(model=ModelConfig(path="/nowhere/model"), coordinator=settings)
    expected = "coordinator.client_endpoint is not a ZeroMQ address: 'nowhere'"
    with (
        Deployment(config, [], http=False) as deployment,
        pytest.raises(LaunchError, match=expected),
    ):
        deployment.start()
