"""What nodes say about themselves, signed with the node key: announcements and node records.

Everything parsed here comes from strangers. Sizes are bounded before parsing, and what comes out has been checked field
by field; whether its author is a member is the caller's question.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from psyche_node.identity import KEY_BYTES, SIGNATURE_BYTES, NodeKey, node_id, public_key, verify
from psyche_node.network.blobs import DIGEST_BYTES
from psyche_node.network.messages import MAX_BLOB_BYTES, MAX_ROUND
from psyche_node.network.wire import node_pb2 as wire

MAX_ANNOUNCEMENT = 512
MAX_RECORD = 2048
MAX_ADDRESSES = 8
MAX_ADDRESS = 128
RUN_BYTES = 32
_ANNOUNCEMENT_CONTEXT = b"psyche-node/announcement/1:"
_RECORD_CONTEXT = b"psyche-node/record/1:"


class Malformed(Exception):
    """A statement is not one: too long, unparsable, a field out of range, or not signed by the key it names."""


@dataclass(frozen=True, slots=True)
class Announcement:
    """A member's word that its update of ``round`` is the blob ``digest`` of ``length`` bytes."""

    run: bytes
    round: int
    node_key: bytes
    digest: bytes
    length: int

    def body(self) -> bytes:
        """Return what is signed."""
        return wire.Announcement(
            run=self.run, round=self.round, node_key=self.node_key, digest=self.digest, length=self.length
        ).SerializeToString(deterministic=True)

    def sign(self, key: NodeKey) -> bytes:
        """Return the wire form, at most 512 bytes. ``key`` must be the one that ``node_key`` names."""
        return _sign(self.body(), _ANNOUNCEMENT_CONTEXT, key)

    @classmethod
    def parse(cls, raw: bytes, run: bytes) -> Announcement:
        """Check a wire form that belongs to ``run``. Raises Malformed."""
        signed = _open(raw, MAX_ANNOUNCEMENT, "an announcement")
        body = wire.Announcement()
        _decode(body, signed.body)
        _require(body.run == run, "it is of another run")
        _require(len(body.digest) == DIGEST_BYTES, f"its digest is {len(body.digest)} bytes, not {DIGEST_BYTES}")
        _require(body.round <= MAX_ROUND, f"round {body.round} is out of range")
        _require(1 <= body.length <= MAX_BLOB_BYTES, f"a length of {body.length} bytes is out of range")
        _check_signature(signed, _ANNOUNCEMENT_CONTEXT, body.node_key)
        announcement = cls(body.run, body.round, body.node_key, body.digest, body.length)
        _require(announcement.body() == signed.body, "its body is not in the one canonical encoding")
        return announcement


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """How to reach a node, in its own words. ``tls_expires`` is in seconds since 1970."""

    run: bytes
    node_key: bytes
    seq: int
    p2p_addresses: tuple[str, ...]
    grpc_address: str
    tls_leaf: bytes
    tls_expires: int
    is_private: bool = False
    """Nobody outside its own network can open a connection to it."""
    observed_ip: str = ""
    """Of a private node: the IP address that others see its connections come from."""
    bulk_address: str = ""
    """Where pieces may be fetched over TLS without gRPC; empty: nowhere."""

    @property
    def node_id(self) -> str:
        return node_id(self.node_key)

    def body(self) -> bytes:
        """Return what is signed."""
        return wire.NodeRecord(
            run=self.run,
            node_key=self.node_key,
            seq=self.seq,
            p2p_addresses=self.p2p_addresses,
            grpc_address=self.grpc_address,
            tls_leaf=self.tls_leaf,
            tls_expires=self.tls_expires,
            is_private=self.is_private,
            observed_ip=self.observed_ip,
            bulk_address=self.bulk_address,
        ).SerializeToString(deterministic=True)

    def sign(self, key: NodeKey) -> bytes:
        """Return the wire form, at most 2048 bytes."""
        return _sign(self.body(), _RECORD_CONTEXT, key)

    @classmethod
    def parse(cls, raw: bytes, run: bytes) -> NodeRecord:
        """Check a wire form that belongs to ``run``. Raises Malformed."""
        signed = _open(raw, MAX_RECORD, "a node record")
        body = wire.NodeRecord()
        _decode(body, signed.body)
        _require(body.run == run, "it is of another run")
        _require(len(body.tls_leaf) == DIGEST_BYTES, f"its TLS leaf hash is {len(body.tls_leaf)} bytes, not 32")
        addresses = tuple(body.p2p_addresses)
        _require(1 <= len(addresses) <= MAX_ADDRESSES, f"{len(addresses)} addresses; 1 to {MAX_ADDRESSES} are allowed")
        for address in addresses:
            split_multiaddr(address)
        split_address(body.grpc_address)
        if body.bulk_address:
            split_address(body.bulk_address)
        if body.observed_ip:
            _require(body.is_private, "it names an observed address, and only a private node does")
            same = split_address(join_address(body.observed_ip, 1))[0] == body.observed_ip
            _require(same, f"{body.observed_ip[:64]!r} is not an IP address as it is written")
        _check_signature(signed, _RECORD_CONTEXT, body.node_key)
        record = cls(
            body.run,
            body.node_key,
            body.seq,
            addresses,
            body.grpc_address,
            body.tls_leaf,
            body.tls_expires,
            body.is_private,
            body.observed_ip,
            body.bulk_address,
        )
        _require(record.body() == signed.body, "its body is not in the one canonical encoding")
        return record


def split_address(address: str) -> tuple[str, int]:
    """Return (IP, port) of ``IP:port`` or ``[IPv6]:port``; names are not resolved. Raises Malformed."""
    host, _, port = address[: MAX_ADDRESS + 1].rpartition(":")
    if host.startswith("[") != host.endswith("]"):
        host = ""
    return _endpoint(host.removeprefix("[").removesuffix("]"), port, address)


def join_address(ip: str, port: int) -> str:
    """Return ``IP:port``, with brackets around an IPv6 address."""
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def split_multiaddr(address: str) -> tuple[str, int]:
    """Return (IP, port) of ``/ip4/IP/tcp/PORT`` or ``/ip6/IP/tcp/PORT``. Raises Malformed for any other multiaddr.

    TCP over an IP address is all there is: py-libp2p's QUIC loses data, and a name would let a record make those who
    read it resolve it.
    """
    parts = address[: MAX_ADDRESS + 1].split("/")
    _require(
        len(parts) == 5 and parts[0] == "" and parts[1] in ("ip4", "ip6") and parts[3] == "tcp",
        f"{address[:64]!r} is not TCP over IP",
    )
    ip, port = _endpoint(parts[2], parts[4], address)
    _require(parts[1] == ("ip6" if ":" in ip else "ip4"), f"{address[:64]!r} is not TCP over IP")
    return ip, port


def join_multiaddr(ip: str, port: int) -> str:
    """Return the multiaddr of a TCP endpoint."""
    return f"/{'ip6' if ':' in ip else 'ip4'}/{ip}/tcp/{port}"


def parse_bootstrap(address: str) -> tuple[bytes, str]:
    """Return (node key, multiaddr without /p2p) of ``/ip4/IP/tcp/PORT/p2p/ID``. Raises Malformed or IdentityError."""
    plain, _, peer = address.rpartition("/p2p/")
    ip, port = split_multiaddr(plain)
    return public_key(peer), join_multiaddr(ip, port)


def _endpoint(host: str, port: str, address: str) -> tuple[str, int]:
    _require(len(address) <= MAX_ADDRESS, f"an address of {len(address)} bytes; at most {MAX_ADDRESS} are read")
    _require(1 <= len(port) <= 5 and port.isascii() and port.isdecimal(), f"{address[:64]!r} is not IP and port")
    _require(0 < int(port) < 65536, f"{address[:64]!r} names no usable port")
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        raise Malformed(f"{address[:64]!r} is not IP and port") from None
    _require("%" not in host, f"{address[:64]!r} names an interface, which means something on one machine only")
    _require(not ip.is_multicast and not ip.is_unspecified, f"nobody can be reached at {address[:64]!r}")
    return str(ip), int(port)


def _sign(body: bytes, context: bytes, key: NodeKey) -> bytes:
    return wire.Signed(body=body, signature=key.sign(context + body)).SerializeToString(deterministic=True)


def _open(raw: bytes, limit: int, what: str) -> wire.Signed:
    _require(len(raw) <= limit, f"{len(raw)} bytes; {what} has at most {limit}")
    signed = wire.Signed()
    _decode(signed, raw)
    # A second encoding of a statement would travel as another message, so there is only one. It is built anew, because
    # a parsed message keeps the fields it does not know.
    again = wire.Signed(body=signed.body, signature=signed.signature)
    _require(again.SerializeToString(deterministic=True) == raw, "it is not in the one canonical encoding")
    return signed


def _check_signature(signed: wire.Signed, context: bytes, node_key: bytes) -> None:
    _require(len(node_key) == KEY_BYTES, f"its node key is {len(node_key)} bytes, not {KEY_BYTES}")
    _require(len(signed.signature) == SIGNATURE_BYTES, "its signature is not 64 bytes")
    _require(verify(node_key, context + signed.body, signed.signature), "its signature is not that of the key it names")


def _decode(message: wire.Signed | wire.Announcement | wire.NodeRecord, raw: bytes) -> None:
    try:
        message.ParseFromString(raw)
    except DecodeError as error:
        raise Malformed(f"it does not parse: {error}") from None


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise Malformed(reason)
