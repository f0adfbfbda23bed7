"""A program may be started with any of stdin, stdout and stderr closed, or cut off later."""

import os
import subprocess
import sys

import pytest

CLOSED = """
import os, sys
os.closerange(0, 3)
sys.stdin = sys.stdout = sys.stderr = None
from fastserve_mega.cli import main
assert main([]) == 2
sys.stderr.write("read by nobody")
sys.exit(os.open(os.devnull, os.O_RDONLY))
"""


def test_the_next_file_is_not_taken_for_a_standard_one():
    child = subprocess.run([sys.executable, "-c", CLOSED], check=False)
    assert child.returncode == 3


def test_a_reader_who_leaves_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "fastserve_mega", "completion", "bash"]
    child = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (child.returncode, child.stderr) == (1, b"")


def test_ctrl_c_before_a_command_has_taken_it_over_is_no_error(monkeypatch):
    from fastserve_mega import cli

    def interrupt(_: object) -> int:
        raise KeyboardInterrupt

    parser = cli.make_parser()
    parser.set_defaults(run=interrupt)
    for each in parser._subparsers._group_actions[0].choices.values():
        each.set_defaults(run=interrupt)
    monkeypatch.setattr(cli, "make_parser", lambda: parser)
    monkeypatch.setattr(cli, "set_up_logging", lambda *_, **__: None)
    assert cli.main(["keygen", "x"]) == 130


def test_a_locale_without_a_letter_gets_an_escape():
    program = "from fastserve_mega import cli; cli._run = lambda _: print('mod\xe8le'); cli.main()"
    child = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
    )
    assert child.stdout == b"mod\\xe8le\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_disk_is_said_in_a_sentence():
    command = [sys.executable, "-m", "fastserve_mega", "completion", "bash"]
    with open("/dev/full", "wb") as full:
        child = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    said = b"fastserve-mega: output: No space left on device\n"
    assert (child.returncode, child.stderr) == (1, said)
