"""When the launcher tries again, and who is taken for hanging."""

import socket
import subprocess
import threading
import time

import pytest
import zmq

from fastserve_mega.launcher.deployment import PROBE_S
from fastserve_mega.launcher.probes import CoordinatorProbe, Watch, http_status
from fastserve_mega.launcher.processes import ConfigurationError, LaunchError
from fastserve_mega.launcher.supervisor import RestartPolicy, supervise
from fastserve_mega.messaging.frames import encode
from fastserve_mega.messaging.messages import Pong
from fastserve_mega.process_tree import await_any_end
from fastserve_mega.system.config import SupervisorConfig

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


def test_what_cannot_start_is_not_tried_again(options):
    deployment = Losing(ConfigurationError("no mpirun"), None)
    with pytest.raises(ConfigurationError, match="no mpirun"):
        supervise(deployment, options, lambda _: None)
    assert len(deployment.restarted) == 1


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
