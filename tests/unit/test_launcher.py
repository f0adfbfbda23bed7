"""Children of the launcher do not outlive it."""

import subprocess
import sys

import pytest

START_A_CHILD = """
import signal
from fastserve_mega.launcher.processes import spawn
spawn(["sleep", "1000"])
print("started", flush=True)
signal.pause()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
@pytest.mark.timeout(60)
def test_a_child_ends_when_the_launcher_is_killed_outright():
    launcher = subprocess.Popen([sys.executable, "-c", START_A_CHILD], stdout=subprocess.PIPE)
    assert launcher.stdout is not None
    with launcher:
        assert launcher.stdout.readline() == b"started\n"
        launcher.kill()
        # The child has the same pipe, so its end is the end of the stream.
        assert launcher.stdout.read() == b""
