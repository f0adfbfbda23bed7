"""When the launcher tries again, and who is taken for hanging."""

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import zmq

from fastserve_mega.launcher import supervisor
from fastserve_mega.launcher.deployment import PROBE_S
from fastserve_mega.launcher.probes import CoordinatorProbe, Watch, http_status
from fastserve_mega.launcher.processes import LaunchError, kept_configuration
from fastserve_mega.launcher.supervisor import RestartPolicy, supervise
from fastserve_mega.messaging.frames import encode
from fastserve_mega.messaging.messages import Pong
from fastserve_mega.process_tree import await_any_end
from fastserve_mega.system.config import Config, ModelConfig, ServerConfig, SupervisorConfig
from fastserve_mega.system.config_file import load_config

WAIT_S = 60.0


class Losing:
    """A deployment that loses its ranks at once, and whose restarts end as they are told to."""

    def __init__(self, *outcomes: Exception | None) -> None:
        self.outcomes = list(outcomes)
        self.restarted: list[set[str]] = []

    def lost(self) -> dict[str, str]:
        if not self.outcomes:
            raise KeyboardInterrupt
        return {"ranks": "the ranks process ended with status 137"}

    def restart(self, names) -> None:
        self.restarted.append(set(names))
        if (outcome := self.outcomes.pop(0)) is not None:
            raise outcome


@pytest.fixture
def options():
    return SupervisorConfig(max_restarts=4)


def test_a_restart_in_vain_is_followed_by_the_next_after_a_pause(options):
    slept = []
    deployment = Losing(LaunchError("lost while starting"), LaunchError("once more"), None)
    with pytest.raises(KeyboardInterrupt):
        supervise(deployment, options, slept.append)
    assert deployment.restarted == [{"ranks"}] * 3
    assert [pause for pause in slept if pause != PROBE_S] == [0.0, 2.0]
    assert slept.count(PROBE_S) == 5  # one look each, and the pause before the second attempt


def test_a_process_that_ends_is_not_noticed_a_look_later_only():
    with subprocess.Popen(["sleep", "60"]) as lives, subprocess.Popen(["true"]) as ends:
        begin = time.monotonic()
        await_any_end([lives.pid, ends.pid], WAIT_S)
        assert time.monotonic() - begin < WAIT_S / 2
        lives.kill()


def test_what_has_served_once_is_tried_again_whatever_it_lacks_now(options):
    deployment = Losing(
        OSError(errno.EAGAIN, "no processes left"), LaunchError("broken keys"), None
    )
    with pytest.raises(KeyboardInterrupt):
        supervise(deployment, options, lambda _: None)
    assert len(deployment.restarted) == 3


def test_who_is_started_again_is_told_what_was_said_at_the_start(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("{model: {path: m}, server: {port: 1}}")
    given = ["--config", str(file), "--set", "server.host=::1"]
    with kept_configuration(given) as kept:
        file.write_text("server: {port: 2}")
        assert load_config(kept[1], kept[3:]).server == ServerConfig(host="::1", port=1)
        file.unlink()
        assert Path(kept[1]).exists()
        assert given[1] == str(file)
    assert not Path(kept[1]).exists()
    with kept_configuration(["--set", "server.port=1"]) as kept:
        assert kept == ["--set", "server.port=1"]


class Interrupted:
    """A deployment during whose start, and end, signals come."""

    def __init__(self, *signals: list[signal.Signals]) -> None:
        self.signals = list(signals)

    def __enter__(self) -> "Interrupted":
        return self

    def start(self) -> None:
        for number in self.signals[0]:
            signal.raise_signal(number)

    def __exit__(self, *_: object) -> None:
        for number in self.signals[1]:
            signal.raise_signal(number)


@pytest.fixture
def serve_with(monkeypatch):
    """Run `serve` with a stand-in; how often everything was killed, and the exit status."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}

    def run(deployment):
        kills = []
        monkeypatch.setattr(supervisor, "Deployment", lambda *_, **__: deployment)
        monkeypatch.setattr(supervisor, "adopt_orphans", lambda: None)
        monkeypatch.setattr(supervisor, "end_descendants", lambda: kills.append(1))
        return supervisor.serve(Config(model=ModelConfig(path="m")), []), len(kills)

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_in_order_and_each_further_one_kills(serve_with, number):
    assert serve_with(Interrupted([number], [])) == (0, 0)
    assert serve_with(Interrupted([number], [number])) == (0, 1)
    assert serve_with(Interrupted([number], [signal.SIGTERM] * 3)) == (0, 3)


def test_a_terminal_that_closes_ends_nothing_under_nohup(serve_with):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert serve_with(Interrupted([signal.SIGHUP, signal.SIGTERM], [signal.SIGHUP])) == (0, 0)


def test_nobody_who_reads_what_serve_says_ends_nothing(serve_with, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert serve_with(Interrupted([signal.SIGTERM], [])) == (0, 0)


def test_the_limit_of_restarts_is_named_when_it_is_reached(options):
    deployment = Losing(*[None] * 5)
    with pytest.raises(LaunchError, match=r"status 137, after 4 restarts within 600 s"):
        supervise(deployment, options, lambda _: None)
    assert len(deployment.restarted) == 4


def test_the_first_attempt_is_made_at_once_and_those_in_vain_wait_longer_and_longer():
    policy = RestartPolicy(max_restarts=50, window_s=600.0)
    waits = [policy.wait_before_attempt(now=float(i)) for i in range(8)]
    assert waits == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_a_loss_right_after_a_restart_counts_as_in_vain_and_a_later_one_does_not():
    policy = RestartPolicy(max_restarts=50, window_s=600.0)
    assert policy.wait_before_attempt(0.0) == 0.0
    policy.succeeded(5.0)
    assert policy.wait_before_attempt(5.7) == 1.0
    policy.succeeded(8.0)
    assert policy.wait_before_attempt(30.0) == 0.0


def test_six_kills_in_a_minute_are_survived_with_the_limits_of_the_configuration():
    policy = RestartPolicy(max_restarts=50, window_s=600.0)
    for kill in range(6):
        assert policy.wait_before_attempt(10.0 * kill) is not None
        policy.succeeded(10.0 * kill + 4.0)


def test_only_attempts_within_the_window_count():
    policy = RestartPolicy(max_restarts=2, window_s=100.0)
    assert policy.wait_before_attempt(0.0) is not None
    assert policy.wait_before_attempt(60.0) is not None
    assert policy.wait_before_attempt(99.0) is None
    assert policy.wait_before_attempt(100.0) is not None


def test_silence_is_hanging_only_after_the_limit_and_several_questions():
    answers = iter([False, True, False, False, False, False])
    watch = Watch(lambda: next(answers), limit_s=8.0, now=0.0)
    assert not watch.hangs(100.0)  # a pause of the one who asks
    assert not watch.hangs(101.0)
    assert not watch.hangs(103.0)
    assert not watch.hangs(105.0)
    assert not watch.hangs(107.0)
    assert watch.hangs(109.0)


def test_only_the_coordinator_that_was_started_counts_as_an_answer():
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    epochs = ["of somebody else", "ours"]

    def answer_twice():
        for epoch in epochs:
            peer, _ = router.recv_multipart()
            router.send_multipart([peer, encode(Pong(epoch))])

    thread = threading.Thread(target=answer_twice)
    thread.start()
    probe = CoordinatorProbe(f"tcp://127.0.0.1:{port}", "ours")
    try:
        assert not probe.answers(1.0)
        assert probe.answers(WAIT_S)
    finally:
        thread.join(WAIT_S)
        probe.close()
        context.destroy(linger=0)


def test_answers_that_come_late_do_not_pile_up():
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")

    def answer_three_times():
        peer, _ = router.recv_multipart()
        for _ in range(3):
            router.send_multipart([peer, encode(Pong("ours"))])

    thread = threading.Thread(target=answer_three_times)
    thread.start()
    probe = CoordinatorProbe(f"tcp://127.0.0.1:{port}", "ours")
    try:
        assert probe.answers(WAIT_S)
        thread.join(WAIT_S)
        # From now on it is silent.
        asked = [probe.answers(1.0) for _ in range(3)]
        assert asked.count(True) <= 1
        assert not asked[-1]
    finally:
        probe.close()
        context.destroy(linger=0)


def test_nobody_listening_is_no_answer():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert http_status("127.0.0.1", port, "/version", 1.0) is None
    probe = CoordinatorProbe(f"tcp://127.0.0.1:{port}", "ours")
    try:
        assert not probe.answers(0.01)
    finally:
        probe.close()
