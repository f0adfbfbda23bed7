"""Addresses of this host: which of them the other hosts can reach."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Mapping, Sequence

from fastserve_mega.worker.topology import Topology

_SIOCGIFADDR = 0x8915
_INTERFACE_NAME_BYTES = 15
_ADDRESS_IN_REPLY = slice(20, 24)
_ANY_PORT = 9
_BACKLOG = 2048
"""Ranks that may connect at the same time."""
_FAR_AWAY = "198.51.100.1"
"""Reserved for documentation, so nobody's own network: the way there is the default route."""


def is_loopback(host: str) -> bool:
    """Whether an address or a name means the machine it is used on."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def own_address_towards(host: str) -> str | None:
    """This host's address on the way to another one, or None when there is no way.

    Nothing is sent: connecting a datagram socket only looks the route up.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, _ANY_PORT))
            return str(probe.getsockname()[0])
    except OSError:
        return None


def address_of_interface(name: str) -> str:
    """The IPv4 address of a network interface.

    Raises:
        ValueError: there is no such interface, or it has no address.
    """
    request = struct.pack("256s", name.encode()[:_INTERFACE_NAME_BYTES])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
        except OSError:
            known = ", ".join(name for _, name in socket.if_nameindex())
            raise ValueError(
                f"there is no network interface {name!r} with an IPv4 address here; there are "
                f"{known}"
            ) from None
    return socket.inet_ntoa(reply[_ADDRESS_IN_REPLY])


def interface_of_address(address: str) -> str | None:
    """The network interface that has this address, if any."""
    for _, name in socket.if_nameindex():
        with contextlib.suppress(ValueError):
            if address_of_interface(name) == address:
                return name
    return None


def choose_own_address(others: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """The address of this host at which the ranks of other hosts can reach it.

    In this order: MASTER_ADDR when it is this host, the address of GLOO_SOCKET_IFNAME, that on the
    way to another host, that of this host's name, that of the default route.

    Args:
        others: names of the other hosts.
        environment: stands in for os.environ.

    Raises:
        ValueError: there is none but loopback.
    """
    environment = os.environ if environment is None else environment
    master = environment.get("MASTER_ADDR", "")
    if master and not is_loopback(master) and _is_own(master):
        return socket.gethostbyname(master)
    # gloo takes a list as well; the first one is as good as any.
    if interface := environment.get("GLOO_SOCKET_IFNAME", "").split(",")[0]:
        return address_of_interface(interface)
    name = socket.gethostname()
    candidates = [own_address_towards(other) for other in others[:1]]
    candidates += [_resolve(name), own_address_towards(_FAR_AWAY)]
    for address in candidates:
        if address is not None and not is_loopback(address):
            return address
    raise ValueError(
        f"the ranks are on several hosts, but {name} has no address that the others can reach: "
        "set MASTER_ADDR to its address or GLOO_SOCKET_IFNAME to its network interface"
    )


def _is_own(host: str) -> bool:
    """Whether a socket here can have this address."""
    try:
        with socket.socket() as probe:
            probe.bind((host, 0))
            return True
    except OSError:
        return False


def _resolve(name: str) -> str | None:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return None


def endpoint_for_other_hosts(endpoint: str, address: str) -> str:
    """A ZeroMQ endpoint at which the ranks of other hosts reach this one.

    Args:
        endpoint: as configured.
        address: of this host; it replaces loopback and the wildcard.

    Raises:
        ValueError: it is not a TCP endpoint.
    """
    scheme, _, rest = endpoint.partition("://")
    host, _, port = rest.rpartition(":")
    if scheme != "tcp":
        raise ValueError(
            f"coordinator.worker_endpoint {endpoint} cannot be reached from other hosts: use tcp"
        )
    if is_loopback(host) or host in ("*", "0.0.0.0"):
        host = address
    return f"tcp://{host}:{port}"


def choose_master(topology: Topology, *, port_is_free: bool) -> str:
    """A host:port on this host for torch.distributed to meet at.

    Args:
        topology: of rank 0, with the hosts.
        port_is_free: MASTER_PORT is not used for anything else.

    Raises:
        ValueError: no address of this host can be reached from the others.
        OSError: MASTER_PORT is in use.
    """
    own = topology.hosts[topology.rank]
    others = [host for host in topology.hosts if host != own]
    address = choose_own_address(others) if others else "127.0.0.1"
    wanted = os.environ.get("MASTER_PORT") if port_is_free else None
    with socket.socket() as probe:
        try:
            probe.bind((address, int(wanted or 0)))
        except OSError as error:
            raise OSError(
                f"cannot use MASTER_PORT {wanted} of {address}: {error.strerror}"
            ) from None
        return f"{address}:{probe.getsockname()[1]}"


def listen_at(host: str, port: int) -> int:
    """A listening socket at one address only, where torch's store would take all of them.

    Returns:
        Its descriptor, which belongs to the caller.

    Raises:
        OSError: it cannot be listened on.
    """
    return socket.create_server((host, port), backlog=_BACKLOG).detach()


def lead_gloo(master_address: str) -> None:
    """Have gloo use the network interface on the way to the master, unless one was chosen.

    Else it takes the address of the host's name, which is loopback on many machines.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    own = own_address_towards(master_address)
    if own is not None and (interface := interface_of_address(own)) is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
