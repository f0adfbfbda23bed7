"""A file of requests against a server without a model."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from contextlib import suppress

import httpx
import pytest
from http_server import serving

from fastserve_mega.offline import batch
from fastserve_mega.offline.batch import BatchOptions, run_batch
from fastserve_mega.text.tokenizer import Tokenizer
from fastserve_mega.types import BACKGROUND_PRIORITY


@pytest.fixture
def files(tmp_path):
    requests = tmp_path / "in.jsonl"
    body = {"prompt": "the fox", "max_tokens": 5, "temperature": 0}
    lines = [
        {"custom_id": str(number), "url": "/v1/completions", "body": body} for number in range(40)
    ]
    lines[7]["body"] = {"prompt": "the fox", "max_tokens": -1}
    requests.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return requests, tmp_path / "out.jsonl"


def options(url, files, **changes):
    return BatchOptions(
        **{"url": url, "requests": files[0], "answers": files[1], "concurrency": 8,
           "patience_s": 60.0} | changes
    )  # fmt: skip


def read(path):
    lines = path.read_text().splitlines()
    return {each["custom_id"]: each["response"] for each in map(json.loads, lines)}


def test_every_line_is_answered_or_refused(start_server, model_directory, files, capsys):
    with start_server() as server, serving(server, Tokenizer(model_directory)) as url:
        assert run_batch(options(f"{url}/v1", files)) == 0
        assert "40 answers in" in capsys.readouterr().out
        answers = read(files[1])
        assert run_batch(options(url, files)) == 0
    assert len(files[1].read_text().splitlines()) == len(answers) == 40
    assert answers["7"]["status_code"] == 400
    assert "max_tokens" in answers["7"]["body"]["error"]["message"]
    good = [each for name, each in answers.items() if name != "7"]
    assert {each["status_code"] for each in good} == {200}
    assert {each["body"]["usage"]["completion_tokens"] for each in good} == {5}


KILLS = 10
WAIT_S = 120.0


def kill_once_longer(command, path, num_bytes):
    """Run a batch, and kill it once its answers have more bytes than that."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + WAIT_S
    while process.poll() is None and (not path.exists() or path.stat().st_size <= num_bytes):
        assert time.monotonic() < deadline
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.005)
    process.kill()
    return process.wait(WAIT_S)


@pytest.mark.slow
def test_killed_anywhere_ten_times_each_line_is_answered_once(start_server, model_directory, files):
    body = {"prompt": "the fox", "max_tokens": 5}
    names = [str(number) for number in range(300)]
    files[0].write_text("".join(
        f"{json.dumps({'custom_id': name, 'url': '/v1/completions', 'body': body})}\n"
        for name in names
    ))  # fmt: skip
    with start_server() as server, serving(server, Tokenizer(model_directory)) as url:
        command = [sys.executable, "-m", "fastserve_mega", "batch", *map(str, files), "--url", url]
        moments = random.Random(7)
        for _ in range(KILLS):
            size = files[1].stat().st_size if files[1].exists() else 0
            ended = kill_once_longer(command, files[1], size + moments.randrange(8_000))
            assert ended == -9  # it was not done before
        assert run_batch(options(url, files)) == 0
    lines = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert sorted(each["custom_id"] for each in lines) == sorted(names)
    assert {each["response"]["status_code"] for each in lines} == {200}


@pytest.fixture
def unreliable(monkeypatch):
    """Let a list of failures come before the answers of a mocked server."""
    troubles, bodies = [], []

    def handle(request):
        bodies.append(json.loads(request.content))
        trouble = troubles.pop(0) if troubles else 200
        if isinstance(trouble, Exception):
            raise trouble
        return httpx.Response(trouble, json={"n": len(bodies)}, headers={"x-request-id": "r"})

    def connect(_):
        transport = httpx.MockTransport(handle)
        return httpx.AsyncClient(transport=transport, base_url="http://x")

    monkeypatch.setattr(batch, "_connect", connect)
    monkeypatch.setattr(batch, "_PAUSES_S", (0.0,))
    return troubles, bodies


def test_a_server_that_is_full_or_restarts_is_asked_again(unreliable, files):
    troubles, bodies = unreliable
    troubles += [429, 503, httpx.ConnectError("refused"), httpx.ReadError("cut"), 500, 500]
    assert run_batch(options("", files, concurrency=1)) == 0
    assert len(bodies) == 46
    assert {each["status_code"] for each in read(files[1]).values()} == {200}
    assert {body["priority"] for body in bodies} == {BACKGROUND_PRIORITY}


def test_what_fails_every_time_is_its_answer(unreliable, files):
    unreliable[0][:] = [500, 500, 500]
    assert run_batch(options("", files, concurrency=1)) == 0
    assert read(files[1])["0"]["status_code"] == 500


def test_a_server_that_is_gone_ends_it_and_the_rest_is_done_later(unreliable, files, capsys):
    troubles, _ = unreliable
    troubles += [200] * 10 + [httpx.ConnectError("refused")] * 10
    assert run_batch(options("", files, patience_s=-1.0, concurrency=1)) == 1
    error = capsys.readouterr().err
    assert error.count("nobody answers (ConnectError: refused); trying for -1 s") == 1
    assert "no answer for -1 s (ConnectError: refused)" in error
    assert len(read(files[1])) == 10
    troubles.clear()
    assert run_batch(options("", files)) == 0
    assert len(files[1].read_text().splitlines()) == len(read(files[1])) == 40
