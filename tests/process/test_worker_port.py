"""Who reaches the ranks' port without being a rank gets nothing, and does no harm."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from concurrent import futures

import pytest
import zmq
from fake_server import VOCAB, RawClient, fake_server
from zmq.utils.monitor import recv_monitor_message

from fastserve_mega.client import Client
from fastserve_mega.coordinator.main import AwakeClock, CoordinatorProcess
from fastserve_mega.coordinator.worker_group import WorkersLostError, ZmqWorkers
from fastserve_mega.logs import LogLimiter
from fastserve_mega.messaging.frames import MAX_FRAME_BYTES, encode, without_key, worker_identity
from fastserve_mega.messaging.rank_messages import CopyResult, StepResult, WorkerFailed, WorkerReady
from fastserve_mega.types import SamplingParams
from fastserve_mega.worker.fake_runner import FakeModelRunner
from fastserve_mega.worker.loop import CoordinatorLostError, WorkerLoop, connect_to_coordinator

WAIT_MS = 20_000
READY = WorkerReady(0, 8, 0, 16)


@pytest.fixture
def context():
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def workers(context):
    workers = ZmqWorkers(context, "tcp://127.0.0.1:0", replicas=1, ranks_per_replica=2)
    yield workers
    workers.close()


@pytest.fixture
def connect(context, workers):
    """Connects with the key, as a rank does."""
    sockets = []

    def connect(rank):
        sockets.append(connect_to_coordinator(context, workers.endpoint, rank))
        return sockets[-1]

    yield connect
    for each in sockets:
        each.close(linger=0)


def refusal(context, address, configure=lambda dealer: None):
    """What ZeroMQ tells one that connects with rank 0's name and is not let in."""
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.IDENTITY, worker_identity(0))
    configure(dealer)
    failures = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    monitor = dealer.get_monitor_socket(failures | zmq.EVENT_DISCONNECTED)
    dealer.connect(address)
    dealer.send(encode(READY))
    assert monitor.poll(WAIT_MS), "nothing happened"
    event = recv_monitor_message(monitor)["event"]
    dealer.disable_monitor()
    monitor.close(linger=0)
    dealer.close(linger=0)
    return event


def await_ranks(workers, missing):
    """Receive until so many ranks only are missing."""
    while len(workers.missing_ranks) > missing:
        assert workers.wait(WAIT_MS / 1000)
        workers.receive()


def with_foreign_key(dealer):
    dealer.curve_serverkey, _ = zmq.curve_keypair()
    dealer.curve_publickey, dealer.curve_secretkey = zmq.curve_keypair()


@pytest.mark.parametrize("configure", [lambda dealer: None, with_foreign_key])
def test_without_the_key_nobody_is_let_in(context, workers, connect, configure):
    address, key = without_key(workers.endpoint)
    assert key
    assert refusal(context, address, configure)
    workers.receive()
    assert workers.missing_ranks == [0, 1]
    connect(0).send(encode(READY))
    assert workers.wait(WAIT_MS / 1000)
    workers.receive()
    assert workers.missing_ranks == [1]


def test_plain_bytes_and_strangers_do_not_disturb_a_running_server(model_directory):
    with fake_server(model_directory) as server, Client(server.endpoint) as client:
        address, _ = without_key(server.process._workers.endpoint)
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        with socket.create_connection((host, int(port))) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
            with contextlib.suppress(ConnectionResetError):
                while plain.recv(4096):
                    pass
        stranger = RawClient(address)
        stranger.send(READY)
        params = SamplingParams(max_tokens=3, ignore_eos=True)
        assert len(client.submit([1, 2], params).wait().token_ids) == 3
        stranger.close()
    assert server.ended_with is None


def test_who_has_the_key_but_no_ranks_name_is_dropped_with_one_line(workers, connect, caplog):
    caplog.set_level(logging.WARNING)
    dealers = [connect(rank) for rank in (2, 3)]
    for dealer in dealers * 3:
        dealer.send(b"junk")
    connect(0).send(encode(READY))
    while workers.missing_ranks != [1] or not caplog.messages:
        assert workers.wait(WAIT_MS / 1000)
        workers.receive()
    (line,) = caplog.messages
    assert line.startswith("dropped 1 messages to the ranks' port")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([StepResult(1, ())], "rank 0 sent StepResult, out of turn"),
        ([WorkerReady(1, 8, 0, 16)], "rank 0 sent WorkerReady of rank 1"),
        ([READY, CopyResult(1, 1, 0.1)], "rank 0 sent CopyResult of rank 1"),
        ([READY, READY], "rank 0 sent WorkerReady, out of turn"),  # it has lost its KV
        ([WorkerFailed(0, "all\n is lost")], "rank 0 failed: all is lost"),
    ],
)
def test_a_rank_that_says_what_is_not_its_turn_is_lost(workers, connect, messages, reason):
    dealer = connect(0)
    for message in messages:
        dealer.send(encode(message))
    with pytest.raises(WorkersLostError, match=reason):
        await_ranks(workers, 0)


@pytest.mark.parametrize("speaks", [True, False])
def test_what_rank_0_said_last_is_told_rather_than_its_end(workers, connect, speaks):
    coordinator = CoordinatorProcess.__new__(CoordinatorProcess)
    parent, held = os.pipe()
    coordinator._workers, coordinator._stdin, coordinator._clock = workers, parent, AwakeClock()
    coordinator._poller = zmq.Poller()
    coordinator._poller.register(parent, zmq.POLLIN)
    dealer = connect(0)
    if speaks:
        dealer.send(encode(WorkerFailed(0, "all is lost")))
    os.close(held)
    reason = "rank 0 failed: all is lost" if speaks else "rank 0 has ended"
    with pytest.raises(WorkersLostError, match=reason):
        coordinator._poll(0)
    os.close(parent)


def test_a_second_process_in_the_name_of_a_rank_is_not_heard(workers, connect):
    connect(0).send(encode(READY))
    assert workers.wait(WAIT_MS / 1000)
    workers.receive()
    connect(0).send(encode(WorkerFailed(0, "not me")))
    connect(1).send(encode(WorkerReady(1, 8, 0, 16)))
    await_ranks(workers, 0)


def test_a_rank_whose_connection_is_cut_ends_though_it_is_made_again(workers, context):
    runner = FakeModelRunner(device_blocks=8, block_size=4, vocab_size=VOCAB)
    rank = connect_to_coordinator(context, workers.endpoint, 0)
    with contextlib.closing(runner), futures.ThreadPoolExecutor() as threads:
        ended = threads.submit(WorkerLoop(rank, 0, runner, lambda: True).run)
        await_ranks(workers, 1)
        workers.send(worker_identity(0), b"x" * (MAX_FRAME_BYTES + 1))  # is not taken
        with pytest.raises(CoordinatorLostError, match="the connection to the coordinator was cut"):
            ended.result(WAIT_MS / 1000)


def test_a_line_stands_for_those_that_were_kept_back():
    limiter = LogLimiter(interval_s=60.0)
    seen = [limiter.count("bad", now) for now in (0.0, 1.0, 59.0, 61.0, 62.0)]
    assert seen == [1, 0, 0, 3, 0]
    assert limiter.count("other", 62.0) == 1
