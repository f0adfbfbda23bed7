"""`serve` with real processes of a fake model, of which one after another is lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import yaml
from fake_server import expected_tokens

from fastserve_mega.client import Client, ServerError
from fastserve_mega.drill.processes import HTTP_SERVER, listening_ports, named_processes
from fastserve_mega.process_tree import descendants, is_running
from fastserve_mega.types import SamplingParams

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(sys.platform != "linux", reason="/proc and prctl are Linux's"),
]
PROGRAM = """
import sys
from fastserve_mega.launcher import serve
from fastserve_mega.logs import set_up_logging
from fastserve_mega.system.config_file import load_config
set_up_logging("serve", verbose=False)
path = sys.argv[1]
sys.exit(serve(load_config(path), ["--config", path], runner="fake"))
"""
WAIT_S = 120.0
COUNT = 3000
PROMPT = [1, 2, 3, 4, 5]
PARAMS = SamplingParams(max_tokens=COUNT, temperature=0.0, ignore_eos=True)
ENDLESS = 100_000
LOOPBACK = "127.0.0.1"


class Served:
    """A running `serve` and how to reach it."""

    def __init__(self, path: Path, model: Path, **sections: dict[str, object]) -> None:
        ports = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        client_port, http_port = (each.getsockname()[1] for each in ports)
        for each in ports:
            each.close()
        self.endpoint, self.url = f"tcp://127.0.0.1:{client_port}", f"http://127.0.0.1:{http_port}"
        plain: dict[str, dict[str, object]] = {
            "model": {"path": str(model)},
            "parallel": {"pipeline": 2, "device": "cpu"},
            "kv_cache": {"block_size": 16, "device_blocks": 20_000},
            "coordinator": {"client_endpoint": self.endpoint, "startup_timeout_s": 100},
            "server": {"port": http_port},
            "supervisor": {"hang_limit_s": 4},
        }
        for name, values in sections.items():
            plain[name] = {**plain[name], **values}
        path.write_text(yaml.safe_dump(plain))
        foreign = ("OMPI_", "PMI", "RANK", "WORLD_SIZE")
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(path)],
            env={name: value for name, value in os.environ.items() if not name.startswith(foreign)},
            stdout=subprocess.PIPE,
        )

    def __enter__(self) -> Served:
        assert self.process.stdout is not None
        while b"Ctrl-C ends it" not in (line := self.process.stdout.readline()):
            assert line, "serve has ended"
        return self

    def __exit__(self, *_: object) -> None:
        with self.process:
            self.process.terminate()
            try:
                self.process.wait(WAIT_S)
            finally:
                self.process.kill()

    def ranks(self) -> list[int]:
        """Process ids of the ranks, in their order."""
        found = named_processes(self.process.pid)
        return [found[name] for name in sorted(found) if name.startswith("rank")]

    def wait_until_closed(self) -> None:
        """Until no connection is accepted any more, which is how stopping begins."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            try:
                httpx.get(f"{self.url}/version")
            except httpx.TransportError:
                return
        raise AssertionError("it goes on accepting connections")

    def stream(self, http: httpx.Client, max_tokens: int):
        body = {"prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0, "stream": True}
        return http.stream("POST", "/v1/completions", json={**body, "ignore_eos": True})


@pytest.fixture(scope="module")
def long_model(model_directory, tmp_path_factory):
    """The fake model with room for answers that take a while."""
    target = tmp_path_factory.mktemp("long-model")
    for file in model_directory.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 200_000}))
    return target


@pytest.fixture
def served(long_model, tmp_path):
    def start(**sections):
        return Served(tmp_path / "config.yaml", long_model, **sections)

    return start


def send(process_id: int, number: signal.Signals) -> None:
    os.kill(process_id, number)


def test_ranks_that_are_lost_while_they_start_are_started_once_more(served):
    expected = expected_tokens(PROMPT, COUNT)
    with served() as server, Client(server.endpoint) as client:
        before = server.ranks()
        generation = client.submit(PROMPT, PARAMS)
        next(iter(generation))
        send(before[0], signal.SIGKILL)
        deadline = time.monotonic() + WAIT_S
        while not (starting := set(server.ranks()) - set(before)):
            assert time.monotonic() < deadline, "nothing is started again"
        send(starting.pop(), signal.SIGKILL)
        assert generation.wait().token_ids == expected


def test_an_http_stream_goes_on_when_the_ranks_are_lost(served):
    with (
        served() as server,
        httpx.Client(base_url=server.url, timeout=WAIT_S) as http,
        server.stream(http, COUNT) as response,
    ):
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        send(server.ranks()[-1], signal.SIGKILL)
        *_, last, done = [line.removeprefix("data: ") for line in lines if line]
    assert json.loads(last)["choices"][0]["finish_reason"] == "length"
    assert done == "[DONE]"


def test_a_request_that_is_sent_again_after_its_http_server_was_killed_has_the_same_answer(served):
    headers = {"Idempotency-Key": "order-17"}
    body = {"prompt": PROMPT, "max_tokens": COUNT, "ignore_eos": True, "stream": True}

    def read(http, texts):
        with http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    texts.append(json.loads(line.removeprefix("data: "))["choices"][0]["text"])
                    yield

    first, second = [], []
    with served() as server, httpx.Client(base_url=server.url, timeout=WAIT_S) as http:
        stream = read(http, first)
        next(stream)
        send(named_processes(server.process.pid)[HTTP_SERVER], signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            list(stream)
        list(read(http, second))
        other = http.post("/v1/completions", json={**body, "prompt": [9]}, headers=headers)
        assert other.status_code == 422
    # Without a seed: these are the tokens of the first one, and then those that follow.
    assert len(first) > 0
    assert "".join(second).startswith("".join(first))


def test_a_stream_that_is_not_finished_in_time_is_told_and_nothing_is_left(served):
    with served(coordinator={"drain_timeout_s": 0.5}) as server:
        everyone = descendants(server.process.pid)
        with (
            httpx.Client(base_url=server.url, timeout=WAIT_S) as http,
            server.stream(http, ENDLESS) as response,
        ):
            lines = response.iter_lines()
            for number in (signal.SIGUSR1, signal.SIGUSR2):  # "reopen your logs", elsewhere
                send(server.process.pid, number)
            assert next(lines).startswith("data: ")
            send(server.process.pid, signal.SIGQUIT)
            *_, last, done = [line.removeprefix("data: ") for line in lines if line]
        assert "shut down" in json.loads(last)["error"]["message"]
        assert done == "[DONE]"
        assert server.process.wait(WAIT_S) == 0
        assert not any(map(is_running, everyone))


def last_words(server: Served, max_tokens: int) -> list[str]:
    """The last two events of a stream."""
    with (
        httpx.Client(base_url=server.url, timeout=WAIT_S) as http,
        server.stream(http, max_tokens) as response,
    ):
        return [line.removeprefix("data: ") for line in response.iter_lines() if line][-2:]


@pytest.mark.slow
def test_under_load_no_stream_ends_without_a_word(served):
    with served(coordinator={"drain_timeout_s": 3}) as server, ThreadPoolExecutor(16) as pool:
        streams = [pool.submit(last_words, server, (1000, ENDLESS)[n % 2]) for n in range(16)]
        with Client(server.endpoint) as client:
            while client.snapshot().generation_tokens < 16 * 20:
                pass
            server.process.terminate()
            for stream in streams:
                last, done = stream.result(WAIT_S)
                assert done == "[DONE]"
                ended = '"finish_reason":"length"' in last
                assert ended or "shut down" in json.loads(last)["error"]["message"]


@pytest.mark.slow
def test_a_second_instance_takes_the_place_of_the_first(served, tmp_path):
    with served(coordinator={"drain_timeout_s": WAIT_S}) as first:
        (tmp_path / "config.yaml").rename(tmp_path / "first.yaml")
        with served() as second, ThreadPoolExecutor(4) as pool:
            streams = [pool.submit(last_words, first, COUNT) for _ in range(4)]
            with Client(first.endpoint) as client:
                while client.snapshot().generation_tokens < 4 * 20:
                    pass
                first.process.terminate()
                first.wait_until_closed()
                # The proxy in front sends what is new to the second one.
                assert last_words(second, 10)[1] == "[DONE]"
                for stream in streams:
                    last, done = stream.result(WAIT_S)
                    assert ('"finish_reason":"length"' in last, done) == (True, "[DONE]")
            assert first.process.wait(WAIT_S) == 0


def test_nothing_but_mpirun_listens_beyond_loopback(served):
    with served() as server:
        beyond = {port for host, port in listening_ports(server.process.pid) if host != LOOPBACK}
        maps = [Path(f"/proc/{each}/maps").read_text() for each in descendants(server.process.pid)]
    # PRRTE has no option for the address of its two ports, one of IPv4 and one of IPv6.
    assert len(beyond) <= 2
    # What is shared there would outlive ranks that are killed, and a container has little of it.
    assert not any("/dev/shm/" in each for each in maps)


def test_the_second_ctrl_c_kills(served):
    with served(coordinator={"drain_timeout_s": 1000}) as server:
        everyone = descendants(server.process.pid)
        with Client(server.endpoint) as client:
            generation = client.submit(PROMPT, SamplingParams(max_tokens=ENDLESS))
            next(iter(generation))
            send(server.process.pid, signal.SIGINT)
            server.wait_until_closed()
            begin = time.monotonic()
            send(server.process.pid, signal.SIGINT)
            server.process.wait(WAIT_S)
            took_s = time.monotonic() - begin
            print(f"the second Ctrl-C took {took_s:.2f} s")
            assert took_s < 5.0
        assert not any(map(is_running, everyone))


def test_nothing_outlives_a_killed_serve_and_clients_are_told(served):
    with served() as server, Client(server.endpoint) as client:
        everyone = descendants(server.process.pid)
        generation = client.submit(PROMPT, SamplingParams(max_tokens=ENDLESS))
        next(iter(generation))
        server.process.kill()
        with pytest.raises(ServerError):
            generation.wait()
        deadline = time.monotonic() + WAIT_S
        while any(map(is_running, everyone)):
            assert time.monotonic() < deadline, "processes are left"
