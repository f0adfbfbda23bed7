import socket

import pytest

from fastserve_mega.worker import network
from fastserve_mega.worker.network import (
    address_of_interface,
    choose_master,
    choose_own_address,
    endpoint_for_other_hosts,
    interface_of_address,
    is_loopback,
    own_address_towards,
)
from fastserve_mega.worker.topology import Topology


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("tcp://127.0.0.1:0", "tcp://10.0.0.7:0"),
        ("tcp://localhost:5571", "tcp://10.0.0.7:5571"),
        ("tcp://*:5571", "tcp://10.0.0.7:5571"),
        ("tcp://0.0.0.0:5571", "tcp://10.0.0.7:5571"),
        ("tcp://192.168.1.1:5571", "tcp://192.168.1.1:5571"),
        ("tcp://eth0:5571", "tcp://eth0:5571"),
    ],
)
def test_endpoints_that_other_hosts_cannot_reach_are_replaced(endpoint, expected):
    assert endpoint_for_other_hosts(endpoint, "10.0.0.7") == expected


def test_an_endpoint_that_is_no_network_is_refused():
    with pytest.raises(ValueError, match="ipc:///tmp/x cannot be reached from other hosts"):
        endpoint_for_other_hosts("ipc:///tmp/x", "10.0.0.7")


def test_loopback_is_known():
    assert is_loopback("127.0.1.1")
    assert is_loopback("localhost")
    assert not is_loopback("10.0.0.7")
    assert not is_loopback("node01")
    assert own_address_towards("127.0.0.1") == "127.0.0.1"
    assert interface_of_address("127.0.0.1") == "lo"
    assert interface_of_address("203.0.113.9") is None
    assert address_of_interface("lo") == "127.0.0.1"
    with pytest.raises(ValueError, match=r"no network interface 'lo9' .*there are .*lo"):
        address_of_interface("lo9")


def test_the_own_address_is_sought_where_it_may_be_found(monkeypatch):
    routes = {"node02": "10.0.0.7", network._FAR_AWAY: "192.168.9.9"}
    names = {}
    monkeypatch.setattr(network, "own_address_towards", routes.get)
    monkeypatch.setattr(network, "_resolve", names.get)
    monkeypatch.setattr(network, "address_of_interface", {"eth3": "10.3.3.3"}.get)
    assert choose_own_address(["node02"], {"GLOO_SOCKET_IFNAME": "eth3,eth4"}) == "10.3.3.3"
    assert choose_own_address(["node02"], {}) == "10.0.0.7"
    # Another host's, and loopback, are of no use.
    for master in ("203.0.113.9", "127.0.0.1"):
        assert choose_own_address(["node02"], {"MASTER_ADDR": master}) == "10.0.0.7"
    assert choose_own_address(["unknown"], {}) == "192.168.9.9"
    routes.clear()
    names[socket.gethostname()] = "127.0.1.1"
    with pytest.raises(ValueError, match=r"set MASTER_ADDR .* or GLOO_SOCKET_IFNAME"):
        choose_own_address(["node02"], {})


def test_on_one_host_the_ranks_meet_on_loopback(monkeypatch):
    monkeypatch.delenv("MASTER_PORT", raising=False)
    here = Topology(rank=0, world_size=2, hosts=("a", "a"))
    host, _, port = choose_master(here, port_is_free=True).rpartition(":")
    assert host == "127.0.0.1"
    monkeypatch.setenv("MASTER_PORT", port)
    assert choose_master(here, port_is_free=True) == f"127.0.0.1:{port}"
    assert choose_master(here, port_is_free=False) != f"127.0.0.1:{port}"
    taken = pytest.raises(OSError, match=f"cannot use MASTER_PORT {port} of 127.0.0.1")
    with socket.create_server(("127.0.0.1", int(port))), taken:
        choose_master(here, port_is_free=True)
