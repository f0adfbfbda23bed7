"""Structures of the output are tried in a process of their own, which may hang or crash.

llguidance limits what it counts, and that is not all: intersected patterns take minutes, and
definitions that refer to each other in a long chain overflow the stack of whoever compiles them.
"""

from __future__ import annotations

import asyncio
import hashlib
import resource
import select
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from fastserve_mega.client import ServerBusyError
from fastserve_mega.process_tree import die_with_parent
from fastserve_mega.text.structured import GrammarUnavailableError, check_structured
from fastserve_mega.types import StructuredOutput

LIMIT_S = 5.0
"""For one structure; most take milliseconds."""
_START_S = 60.0
"""For the process to come up, on a machine that is busy."""
_MOST_WAITING = 32
_KEPT_VERDICTS = 1024
_READY = b"ready\n"
_COMMAND = (sys.executable, "-m", "fastserve_mega.server.structure_check")


class StructureChecker:
    """Finds out whether structures can be followed, one after the other; remembers what it found.

    Args:
        limit_s: for each of them.
        command: of the process that does it.
    """

    def __init__(self, limit_s: float = LIMIT_S, command: Sequence[str] = _COMMAND) -> None:
        self._limit_s = limit_s
        self._command = command
        self._thread = ThreadPoolExecutor(1, "structure-check")
        self._process: subprocess.Popen[bytes] | None = None
        self._waiting = 0
        self._verdicts: OrderedDict[bytes, str] = OrderedDict()

    async def check(self, structured: StructuredOutput) -> None:
        """Try a structure.

        Raises:
            ValueError: it cannot be followed, or finding that out takes too long.
            ServerBusyError: too many others wait.
        """
        try:
            line = msgspec.json.encode(structured)
        except UnicodeEncodeError as error:
            raise ValueError(f"a structure is not valid Unicode: {error.reason}") from None
        name = hashlib.blake2b(line).digest()
        if name not in self._verdicts:
            if self._waiting >= _MOST_WAITING:
                raise ServerBusyError(
                    f"{self._waiting} structures of outputs wait to be checked, the limit is "
                    f"{_MOST_WAITING}; try again later"
                )
            self._waiting += 1
            try:
                loop = asyncio.get_running_loop()
                verdict = await loop.run_in_executor(self._thread, self._ask, line)
            finally:
                self._waiting -= 1
            self._verdicts[name] = verdict
            if len(self._verdicts) > _KEPT_VERDICTS:
                self._verdicts.popitem(last=False)
        if verdict := self._verdicts[name]:
            raise ValueError(verdict)

    def close(self) -> None:
        """End the process."""
        self._thread.submit(self._end)
        self._thread.shutdown()

    def _ask(self, line: bytes) -> str:
        """What is wrong with a structure; empty when nothing is.

        Raises:
            ValueError: it takes too long. On a machine less busy it may not, so that is not kept.
            ServerBusyError: the process cannot be started, which says nothing of the structure.
        """
        process = self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(line + b"\n")
            process.stdin.flush()
            return str(msgspec.json.decode(self._answer(process, self._limit_s)))
        except TimeoutError:
            self._end()
            raise ValueError(
                f"the structure of the output takes more than {self._limit_s:g} s to compile"
            ) from None
        except (OSError, EOFError):
            self._end()
            return "the structure of the output is too complex: compiling it takes too much memory"

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self._end()  # somebody else has ended it
        if self._process is None:
            try:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    preexec_fn=die_with_parent,  # noqa: PLW1509 - one system call, no lock
                )
                self._answer(self._process, _START_S)
            except (OSError, EOFError) as error:  # a TimeoutError is an OSError
                self._end()
                raise ServerBusyError(
                    "structures of outputs cannot be checked now: the process for that does not "
                    f"start ({str(error) or type(error).__name__}); try again later"
                ) from error
        return self._process

    @staticmethod
    def _answer(process: subprocess.Popen[bytes], within_s: float) -> bytes:
        """Read a line."""
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], within_s)[0]:
            raise TimeoutError
        if not (line := process.stdout.readline()):
            raise EOFError
        return line

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


def verdict(line: bytes) -> str:
    """What is wrong with a structure, in JSON; empty when nothing is."""
    try:
        check_structured(msgspec.json.decode(line, type=StructuredOutput))
    except (ValueError, GrammarUnavailableError) as error:
        return str(error)
    return ""


def main() -> None:
    """Answer each line of the input with a verdict, until there are no more."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = sys.stdout.buffer
    answers.write(_READY)
    answers.flush()
    for line in sys.stdin.buffer:
        answers.write(msgspec.json.encode(verdict(line)) + b"\n")
        answers.flush()


if __name__ == "__main__":
    main()
