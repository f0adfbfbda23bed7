"""The terminal view of a whole server without a model."""

import io

from rich.console import Console

from fastserve_mega.cli import main
from fastserve_mega.client import Client
from fastserve_mega.messaging.messages import Snapshot
from fastserve_mega.snapshot import Percentiles, PoolView, ReplicaView, RequestView
from fastserve_mega.terminal.top import render
from fastserve_mega.types import SamplingParams

ENDLESS = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)


def make_snapshot(clock_s, generated, swapped):
    views = [("a", 0, "resident", True), ("b", 1, "swapped", False), ("c", 1, "waiting", False)]
    requests = tuple(
        RequestView(name, level, place, running, 5, 2, 6, 0.5)
        for name, level, place, running in views
    )
    replica = ReplicaView(
        (1, 1234), (0.00022, 1.5), requests, PoolView(30, 10, 63), PoolView(5, 0, 0), 1, 7,
        swapped, 0, 0, 0, 0,
    )  # fmt: skip
    latency = Percentiles(0.2, 0.1, 0.25, 3.0)
    return Snapshot(clock_s, (replica, replica), 100, generated, 42, latency, latency)


def text_of(view):
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(view)
    return console.export_text()


def test_levels_pools_and_rates():
    text = text_of(render(make_snapshot(12.0, 500, 40), make_snapshot(10.0, 400, 20)))
    assert "50.0" in text  # tokens/s
    assert "100 ms, 250 ms" in text
    assert "2,470" in text  # unfinished, of both replicas
    assert "replica 1" in text
    q1, q2 = [line for line in text.splitlines() if line.lstrip("│ ").startswith(("Q1", "Q2"))][:2]
    assert "0.22 ms" in q1
    assert q1.count("■") == 1
    assert "1.5 s" in q2
    assert "1,234" in q2
    assert q2.count("■") == 2
    host = next(line for line in text.splitlines() if line.lstrip("│ ").startswith("host"))
    assert " 10 " in host  # blocks/s
    assert "no pool" in host


def test_once_prints_one_view(start_server, tmp_path, capsys, model_directory):
    with start_server() as server, Client(server.endpoint) as client:
        generation = client.submit([1, 2, 3], ENDLESS)
        next(iter(generation))
        config = tmp_path / "config.yaml"
        config.write_text(
            f"model: {{path: {model_directory}}}\n"
            f"coordinator: {{client_endpoint: '{server.endpoint}'}}\n"
        )
        assert main(["top", "--config", str(config), "--once"]) == 0
        generation.cancel()
    printed = capsys.readouterr().out
    assert "KV blocks" in printed
    assert "Q10" in printed


def test_without_a_server_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastserve_mega.terminal.top._ANSWER_S", 0.1)
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: {{path: /nowhere}}\ncoordinator: {{client_endpoint: 'ipc://{tmp_path}/nobody'}}\n"
    )
    assert main(["top", "--config", str(config), "--once"]) == 1
    assert "no answer from the coordinator" in capsys.readouterr().err
    assert main(["top", "--url", "http://127.0.0.1:8000", "--once"]) == 1
    assert "top: not a ZeroMQ address: 'http://" in capsys.readouterr().err
