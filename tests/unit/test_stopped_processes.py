"""Which processes of a tree a signal has stopped."""

import os
import signal
import subprocess
import sys

import pytest

from fastserve_mega.process_tree import stopped

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")


def test_a_stopped_process_is_found_until_it_goes_on_or_ends():
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        assert stopped(child.pid) == set()
        os.kill(child.pid, signal.SIGSTOP)
        os.waitpid(child.pid, os.WUNTRACED)
        assert stopped(child.pid) == {child.pid}
        assert child.pid in stopped(os.getpid())
        os.kill(child.pid, signal.SIGCONT)
        os.waitpid(child.pid, os.WCONTINUED)
        assert stopped(child.pid) == set()
    assert stopped(child.pid) == set()
