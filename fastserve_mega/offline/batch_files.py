"""The two files of a batch, in OpenAI's batch format: requests, and their answers.

The file of answers is the record of what is done: a batch that was cut off goes on from it.
"""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastserve_mega.records import Record, convert

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")


class BatchRequest(Record, frozen=True):
    """A line of the input."""

    custom_id: str
    """Unique in the file."""
    url: str
    """Path of the endpoint."""
    body: dict[str, Any]
    method: str = "POST"


def read_requests(path: Path) -> Iterator[BatchRequest]:
    """The lines of a file, one at a time; empty ones are skipped.

    Raises:
        ValueError: a line is no request; the message names its number.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                request = convert(json.loads(line), BatchRequest)
                _check(request)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            yield request


def count_requests(path: Path) -> int:
    """How many there are, all of them checked.

    Raises:
        ValueError: a line is no request, or has the custom_id of another one.
        OSError: the file cannot be read.
    """
    seen: set[str] = set()
    for request in read_requests(path):
        if request.custom_id in seen:
            raise ValueError(f"{path}: two lines have the custom_id {request.custom_id!r}")
        seen.add(request.custom_id)
    return len(seen)


def _check(request: BatchRequest) -> None:
    if request.method != "POST":
        raise ValueError(f"method must be POST, got {request.method!r}")
    if request.url not in URLS:
        raise ValueError(f"url must be one of {', '.join(URLS)}, got {request.url!r}")
    if request.body.get("stream"):
        raise ValueError("stream must not be true in a batch")


class AnswerFile:
    """Answers, each appended in one piece. A context manager.

    Args:
        path: of the file; what an earlier run has finished stays, and the piece of a line that it
            was cut off in is removed.

    Raises:
        ValueError: the file is there and is not one of answers, or another batch writes to it.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            # Two would answer each line twice. The lock goes with the process, however it ends.
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.done = self._read_done(path)
        except BlockingIOError:
            os.close(self._descriptor)
            raise ValueError(f"{path}: another batch is writing to it") from None
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def add(self, custom_id: str, status_code: int, request_id: str, body: object) -> None:
        """Write an answer, or a refusal, of which the status code tells."""
        response = {"status_code": status_code, "request_id": request_id, "body": body}
        line = {
            "id": f"batch_req_{uuid.uuid4().hex}",
            "custom_id": custom_id,
            "response": response,
            "error": None,
        }
        data = json.dumps(line, ensure_ascii=False).encode("utf-8") + b"\n"
        while data:
            data = data[os.write(self._descriptor, data) :]
        self.done.add(custom_id)

    def _read_done(self, path: Path) -> set[str]:
        done, whole = set(), 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break  # cut off in the middle
                done.add(_custom_id(line, f"{path}, line {number}"))
                whole += len(line)
        os.ftruncate(self._descriptor, whole)
        return done


def _custom_id(line: bytes, where: str) -> str:
    try:
        answer = json.loads(line)
    except ValueError:
        answer = None
    if not isinstance(answer, Mapping) or not isinstance(answer.get("custom_id"), str):
        raise ValueError(f"{where}: not an answer of a batch; is it the right file?")
    return str(answer["custom_id"])
