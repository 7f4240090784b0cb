"""At which addresses this node tells the others to reach it, and for which run."""

from __future__ import annotations

import ipaddress
import logging
import socket
from dataclasses import dataclass

import base58
import psutil

from psyche_node.network.statements import RUN_BYTES, join_address, join_multiaddr, split_address

log = logging.getLogger(__name__)


class NetworkError(Exception):
    """The network process cannot do what it was asked; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Addresses:
    """``host`` is the IP address of the interface; the forwarded ones (``IP:port``, or empty) replace what it has."""

    host: str
    p2p_port: int
    grpc_port: int
    forwarded_p2p: str = ""
    forwarded_grpc: str = ""
    bulk_port: int = 0
    forwarded_bulk: str = ""

    def p2p(self, outside: str = "") -> tuple[str, ...]:
        """Return libp2p addresses, the best one first. ``outside`` is the IP at which others see a node behind NAT."""
        if self.forwarded_p2p:
            return (join_multiaddr(*split_address(self.forwarded_p2p)),)
        return tuple(join_multiaddr(ip, self.p2p_port) for ip in dict.fromkeys((outside or self.host, self.host)))

    def grpc(self, outside: str = "") -> str:
        """Return the address that updates are fetched from."""
        return self.forwarded_grpc or join_address(outside or self.host, self.grpc_port)

    def bulk(self, outside: str = "") -> str:
        """Return the address of the bulk server, empty if it is none that others could reach."""
        if self.forwarded_bulk or self.forwarded_grpc:
            # A router that forwards the other ports alone leads nowhere from its own address.
            return self.forwarded_bulk
        return join_address(outside or self.host, self.bulk_port)


def announced_host(listen_host: str, bootstrap: list[tuple[bytes, str]]) -> str:
    """Return the IP address to announce: ``listen_host``, or for 0.0.0.0 the interface towards the bootstrap node.

    Without a route there, as in a network of its own, it is the first address of any interface that is up.
    Raises NetworkError when ``listen_host`` is no IP address.
    """
    try:
        ip = ipaddress.ip_address(listen_host)
    except ValueError:
        raise NetworkError(f"listen_host is {listen_host!r}; give an IP address of this machine, or 0.0.0.0") from None
    if not ip.is_unspecified:
        return str(ip)
    family, target = (socket.AF_INET, "192.0.2.1") if ip.version == 4 else (socket.AF_INET6, "2001:db8::1")
    for _, address in bootstrap:
        towards = address.split("/")[2]
        if ipaddress.ip_address(towards).version == ip.version:
            target = towards
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            # Connecting a datagram socket sends nothing; it only chooses the interface.
            probe.connect((target, 9))
        except OSError:
            return _any_address(family)
        return str(probe.getsockname()[0])


def _any_address(family: socket.AddressFamily) -> str:
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    for name, addresses in psutil.net_if_addrs().items():
        for address in [one.address for one in addresses if one.family == family and name in up]:
            # Not one that is valid on its link alone ("fe80::1%eth0"), nor the loopback interface's.
            if "%" not in address and not ipaddress.ip_address(address).is_loopback:
                return address
    alone = "127.0.0.1" if family == socket.AF_INET else "::1"
    log.warning(
        "no interface has an address but the loopback one; %s is announced, at which nobody else gets in", alone
    )
    return alone


def parse_run(text: str) -> bytes:
    """Return the 32 bytes of a run account's address, given in hex or base58. Raises NetworkError."""
    try:
        run = bytes.fromhex(text) if len(text) == 2 * RUN_BYTES else base58.b58decode(text[:64])
    except ValueError:
        run = b""
    if len(run) != RUN_BYTES:
        raise NetworkError(f"{text[:80]!r} is not a run's address: give its 32 bytes in hex or base58")
    return run
