"""Keys of the clients' port: who has none is not let in and hears nothing."""

from __future__ import annotations

import stat

import pytest
import zmq

from fastserve_mega import cli
from fastserve_mega.client import Client, ServerUnavailableError
from fastserve_mega.launcher.probes import CoordinatorProbe
from fastserve_mega.messaging.frames import encode
from fastserve_mega.messaging.messages import Hello
from fastserve_mega.system.config import CoordinatorConfig
from fastserve_mega.system.key_file import client_address, coordinator_key, read_key_file

SHORT_S = 0.3
"""Longest wait for what must not come."""


@pytest.fixture
def key_file(tmp_path, capsys):
    path = tmp_path / "clients.key"
    assert cli.main(["keygen", str(path)]) == 0
    assert f"{path}.pub" in capsys.readouterr().out
    return path


def options_of(path) -> CoordinatorConfig:
    return CoordinatorConfig(client_key_file=str(path))


def test_only_who_has_the_key_is_let_in(start_server, key_file):
    key = client_address(options_of(f"{key_file}.pub")).partition(" ")[2]
    with start_server(coordinator={"client_key_file": str(key_file)}) as server:
        bare = server.endpoint.removesuffix(f" {key}")
        address = f"{bare} {key}"
        with Client(address) as client:
            assert client.submit([1, 2, 3]).wait().usage.completion_tokens > 0
            probe = CoordinatorProbe(address, client.info().epoch)
            assert probe.answers(10.0)
            probe.close()
        other = zmq.curve_keypair()[0].decode()
        for stranger in (bare, f"{bare} {other}"):
            with (
                pytest.raises(ServerUnavailableError) as told,
                Client(stranger, timeout_s=SHORT_S),
            ):
                pass
            assert other not in str(told.value)
        # Nor does the socket itself take anything.
        context = zmq.Context()
        raw = context.socket(zmq.DEALER)
        raw.connect(bare)
        raw.send(encode(Hello()))
        assert not raw.poll(SHORT_S * 1000)
        context.destroy(linger=0)


def test_the_coordinators_file_is_for_its_owner_only_and_is_never_replaced(key_file, capsys):
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    before = key_file.read_text()
    assert cli.main(["keygen", str(key_file)]) == 2
    assert "exists" in capsys.readouterr().err
    assert key_file.read_text() == before
    assert read_key_file(f"{key_file}.pub").secret is None


def test_a_coordinator_with_the_clients_file_says_so(key_file):
    assert coordinator_key(options_of(key_file)) is not None
    with pytest.raises(ValueError, match="is the file for clients"):
        coordinator_key(options_of(f"{key_file}.pub"))


def test_what_is_no_key_file_is_told(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("public and private matters\n")
    with pytest.raises(ValueError, match=r"notes\.txt is not a file of `fastserve-mega keygen`"):
        client_address(options_of(path))
