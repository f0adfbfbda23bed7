"""What one client does is no reason to take another one for gone."""

from __future__ import annotations

import socket

import pytest
import zmq
from fake_server import RawClient, fake_server

from fastserve_mega.client import Client, InvalidRequestError
from fastserve_mega.coordinator.front_door import FrontDoor
from fastserve_mega.messaging.frames import PeerBusyError, client_frame_limit
from fastserve_mega.messaging.messages import Finished, Ping
from fastserve_mega.types import FinishReason, SamplingParams, Usage

WAIT_MS = 20_000
ONE = SamplingParams(max_tokens=1, ignore_eos=True)


def test_a_client_is_not_silent_while_its_messages_wait_to_be_read():
    context = zmq.Context()
    door = FrontDoor(context, "tcp://127.0.0.1:0", buffer=10, timeout_s=30.0)
    client = RawClient(door.endpoint)
    try:
        client.send(Ping())
        assert door.socket.poll(WAIT_MS)
        assert len(list(door.receive(0.0))) == 1
        client.send(Ping())
        assert door.socket.poll(WAIT_MS)
        assert list(door.take_lost(100.0)) == []  # the coordinator was away, not the client
        assert len(list(door.receive(101.0))) == 1
        assert list(door.take_lost(130.0)) == []
        assert [why for _, why in door.take_lost(132.0)] == ["the client went away"]
    finally:
        client.close()
        door.close()
        context.term()


def test_a_client_that_does_not_read_costs_little_and_is_told_all_when_it_does(monkeypatch):
    monkeypatch.setattr("fastserve_mega.coordinator.front_door._MOST_OWED", 500)
    context = zmq.Context()
    door = FrontDoor(context, "tcp://127.0.0.1:0", buffer=10, timeout_s=30.0)
    client = RawClient(door.endpoint, receive_buffer=10)
    refused = 0

    def ask():
        client.send(Ping())
        assert door.socket.poll(WAIT_MS)
        return [peer for peer, _ in door.receive(0.0)]

    try:
        (peer,) = ask()
        # More than the buffers of TCP hold.
        told = [
            Finished(f"r{i}", FinishReason.ABORT, Usage(1, 0), "x" * 19_999) for i in range(1_500)
        ]
        for finished in told:
            door.send(peer, finished)
        send = door._router.send_frame

        def counted(*frame):
            nonlocal refused
            try:
                send(*frame)
            except PeerBusyError:
                refused += 1
                raise

        monkeypatch.setattr(door._router, "send_frame", counted)
        assert [ask() for _ in range(20)] == [[]] * 20  # nobody listens to what it will not hear
        # What the buffers had room for went out; the rest is not tried at each message anew.
        assert refused == 20
        names = set()
        for _ in told:
            if not client._socket.poll(2):
                ask()
            names.add(client.receive().request_id)
        assert names == {finished.request_id for finished in told}
        assert ask() == [peer]
    finally:
        client.close()
        door.close()
        context.term()


def test_a_frame_that_no_request_can_need_costs_its_sender_the_connection(model_directory):
    with fake_server(model_directory) as server, Client(server.endpoint) as client:
        limit = client_frame_limit(client.info().max_context)
        with pytest.raises(InvalidRequestError, match=f"the limit is {limit}"):
            client.submit([300] * limit, ONE)
        flooder = RawClient(server.endpoint)
        flooder.send_frames(b"x" * (limit + 1))
        assert len(client.submit([1, 2], ONE).wait().token_ids) == 1
        flooder.close()


def test_a_port_that_is_none_opens_no_other():
    context = zmq.Context()
    expected = r"cannot listen on tcp://127\.0\.0\.1:65537: the highest port is 65535"
    try:
        with pytest.raises(OSError, match=expected):
            FrontDoor(context, "tcp://127.0.0.1:65537", buffer=10, timeout_s=30.0)
    finally:
        context.term()


def test_the_path_of_one_server_is_not_taken_away_by_another_and_is_free_once_it_has_gone(tmp_path):
    context = zmq.Context()
    endpoint = f"ipc://{tmp_path}/clients"
    options = {"buffer": 10, "timeout_s": 30.0}
    first = FrontDoor(context, endpoint, **options)
    client = RawClient(endpoint)
    try:
        with pytest.raises(OSError, match=rf"cannot listen on {endpoint}: Address already in use"):
            FrontDoor(context, endpoint, **options)
        client.send(Ping())
        assert first.socket.poll(WAIT_MS)
    finally:
        client.close()
        first.close()
    with socket.socket(socket.AF_UNIX) as killed:  # closed, it leaves its path as one does
        killed.bind(f"{tmp_path}/left")
    FrontDoor(context, f"ipc://{tmp_path}/left", **options).close()
    context.term()


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_an_ipv6_address_is_one_like_any_other():
    context = zmq.Context()
    door = FrontDoor(context, "tcp://[::1]:0", buffer=10, timeout_s=30.0)
    client = RawClient(door.endpoint)
    try:
        client.send(Ping())
        assert door.socket.poll(WAIT_MS)
    finally:
        client.close()
        door.close()
        context.term()
