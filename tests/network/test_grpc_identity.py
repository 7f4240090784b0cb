"""Attacks on the identity of gRPC's two ends, against the real server and the real client, over TLS on loopback."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import h2.config
import h2.connection
import h2.events
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from forged_certificates import extension_of, forge
from grpc_nodes import Node
from hypothesis import given, settings
from hypothesis import strategies as st
from nodes_of_a_test import makers_of

from psyche_node.identity import NodeKey
from psyche_node.network.certificates import BadCertificate, Leaf, identify, issue, null_ca_pem
from psyche_node.network.links import CallFailed, Cause, probe
from psyche_node.network.messages import Rejected
from psyche_node.network.service import SERVICE
from psyche_node.network.wire import node_pb2 as wire

pytestmark = pytest.mark.timeout(240)


def soon() -> int:
    """A sequence number above those of the records that ``knows`` adds."""
    return time.time_ns() // 1_000_000 + 1000


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[], Node]]:
    yield from makers_of(Node, tmp_path)


@pytest.fixture
def server(make: Callable[[], Node]) -> Node:
    node = make()
    node.directory.set_members({0: node.key.public})
    return node


def attack(server: Node, leaf: Leaf | None, timeout: float | None = 60.0, method: str = "Since") -> grpc.StatusCode:
    """Call the server with this client certificate, trusting the server's leaf, and return the status."""
    pair = (leaf.key, leaf.certificate) if leaf else (None, None)
    options = [("grpc.ssl_target_name_override", server.leaf.name), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.secure_channel(
        server.address, grpc.ssl_channel_credentials(server.leaf.certificate, *pair), options=options
    ) as channel:
        try:
            channel.unary_unary(f"/{SERVICE}/{method}")(wire.SinceRequest().SerializeToString(), timeout=timeout)
        except grpc.RpcError as error:
            return error.code()
        return grpc.StatusCode.OK


def test_members_talk_both_ways_and_the_identity_is_the_callers(make: Callable[[], Node]) -> None:
    a, b = make(), make()
    a.knows(b)
    b.knows(a)
    a.ask(b)
    b.ask(a)
    reply = a.links.call(b.key.public, "Announce", wire.AnnounceRequest(announcements=[b"x"]), wire.AnnounceReply, 60.0)
    assert isinstance(reply, wire.AnnounceReply)
    assert b.taken == [b"x"]
    assert not a.refusals() + b.refusals()


# The server is attacked ----------------------------------------------------------------------------------------------


def test_no_client_certificate(server: Node) -> None:
    assert attack(server, None) is grpc.StatusCode.UNAVAILABLE


def test_a_certificate_without_the_extension(server: Node) -> None:
    assert attack(server, forge(extension=None)) is grpc.StatusCode.PERMISSION_DENIED
    assert "no libp2p extension" in server.refusals()[0]


def test_a_stolen_extension_on_another_key(server: Node) -> None:
    member = issue(server.key)
    assert attack(server, member) is grpc.StatusCode.OK
    assert attack(server, forge(extension=extension_of(member))) is grpc.StatusCode.PERMISSION_DENIED
    assert "not signed by the node key" in server.refusals()[0]


def test_a_members_certificate_without_its_key(server: Node) -> None:
    member = issue(server.key)
    thief = replace(member, key=issue(NodeKey.generate()).key)
    assert attack(server, thief) is not grpc.StatusCode.OK


def test_a_self_signed_certificate(server: Node) -> None:
    """Its extension is right, and it is not asked for: it does not even come through TLS."""
    key = ec.generate_private_key(ec.SECP256R1())
    assert attack(server, forge(extension=None, key=key, issuer_key=key)) is grpc.StatusCode.UNAVAILABLE


def test_an_expired_certificate_and_one_of_the_future(server: Node) -> None:
    assert attack(server, issue(server.key, lifetime=60, now=time.time() - 3600)) is grpc.StatusCode.UNAVAILABLE
    assert attack(server, issue(server.key, now=time.time() + 86400)) is grpc.StatusCode.UNAVAILABLE


def test_a_key_that_is_not_a_members(server: Node) -> None:
    stranger = NodeKey.generate()
    assert attack(server, issue(stranger)) is grpc.StatusCode.PERMISSION_DENIED
    rejected = next(event for event in server.events if isinstance(event, Rejected))
    assert (rejected.what, rejected.peer, rejected.member) == ("call", stranger.node_id, None)
    assert attack(server, issue(stranger), method="Fetch") is grpc.StatusCode.PERMISSION_DENIED


def test_a_certificate_that_a_member_vouches_for(server: Node) -> None:
    """A member's CA:TRUE leaf proves nothing for a certificate it signs."""
    member_key = ec.generate_private_key(ec.SECP256R1())
    assert (
        attack(server, forge(extension=None, issuer_key=member_key, name=server.leaf.name, ca=True))
        is grpc.StatusCode.UNAVAILABLE
    )


def test_membership_is_asked_on_every_call(make: Callable[[], Node]) -> None:
    a, b = make(), make()
    a.knows(b)
    b.knows(a)
    a.ask(b)
    b.directory.set_members({0: b.key.public})
    with pytest.raises(CallFailed) as failure:
        a.ask(b)
    assert failure.value.cause is Cause.REFUSED
    b.knows(a)
    a.ask(b)


def test_a_call_without_a_deadline_or_with_a_long_one(server: Node) -> None:
    member = issue(server.key)
    assert attack(server, member, timeout=None) is grpc.StatusCode.INVALID_ARGUMENT
    assert attack(server, member, timeout=3600) is grpc.StatusCode.INVALID_ARGUMENT


def test_tls_1_2(server: Node, tmp_path: Path) -> None:
    """gRPC would negotiate it; the guard does not serve it. Spoken by hand, since no gRPC client can be told to."""
    leaf = issue(server.key)
    (tmp_path / "leaf.pem").write_bytes(leaf.key + leaf.certificate)

    def call(version: ssl.TLSVersion) -> str | None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.minimum_version = context.maximum_version = version
        context.set_alpn_protocols(["h2"])
        context.load_cert_chain(tmp_path / "leaf.pem")
        connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        with (
            socket.create_connection(("127.0.0.1", server.server.port), timeout=60) as raw,
            context.wrap_socket(raw) as tls,
        ):
            connection.initiate_connection()
            headers = {
                ":method": "POST",
                ":scheme": "https",
                ":path": f"/{SERVICE}/Since",
                ":authority": "x",
                "te": "trailers",
                "content-type": "application/grpc",
                "grpc-timeout": "5S",
            }
            connection.send_headers(1, list(headers.items()))
            connection.send_data(1, bytes(5), end_stream=True)
            tls.sendall(connection.data_to_send())
            while data := tls.recv(65536):
                for event in connection.receive_data(data):
                    if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                        status = dict(event.headers).get("grpc-status")
                        if status is not None:
                            return str(status)
        return None

    assert call(ssl.TLSVersion.TLSv1_3) == str(grpc.StatusCode.OK.value[0])
    assert call(ssl.TLSVersion.TLSv1_2) == str(grpc.StatusCode.PERMISSION_DENIED.value[0])
    assert "not TLS 1.3" in server.refusals()[0]


# The client is attacked ----------------------------------------------------------------------------------------------


def test_another_node_at_the_address(make: Callable[[], Node]) -> None:
    a, b, impostor = make(), make(), make()
    a.knows(b, impostor)
    a.directory.add(replace(b.record(soon()), grpc_address=impostor.address), b"")
    with pytest.raises(CallFailed, match="another node answers") as failure:
        a.ask(b)
    assert failure.value.cause is Cause.IDENTITY
    assert impostor.key.node_id in [event.peer for event in a.events if isinstance(event, Rejected)]


def test_another_certificate_than_the_one_in_the_record(make: Callable[[], Node]) -> None:
    """Somebody with an old TLS key of the node: the record's hash ends what a stolen key is good for."""
    a, b = make(), make()
    a.knows(b)
    a.directory.add(replace(b.record(soon()), tls_leaf=bytes(32)), b"")
    with pytest.raises(CallFailed, match="not the one in the node's record"):
        a.ask(b)


def test_an_impostor_that_takes_over_after_the_pin(make: Callable[[], Node]) -> None:
    """It has the victim's address, name and extension, and the null CA's signature. It lacks the pinned key."""
    a, b = make(), make()
    a.knows(b)
    b.knows(a)
    a.ask(b)
    port, name, stolen = b.server.port, b.leaf.name, extension_of(b.leaf)
    b.server.stop()
    impostor = forge(extension=stolen, name=name)
    fake = grpc.server(ThreadPoolExecutor(1))
    fake.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(
                SERVICE, {"Since": grpc.unary_unary_rpc_method_handler(lambda request, context: b"")}
            ),
        )
    )
    credentials = grpc.ssl_server_credentials(
        [(impostor.key, impostor.certificate)], null_ca_pem(), require_client_auth=True
    )
    assert fake.add_secure_port(f"127.0.0.1:{port}", credentials) == port
    fake.start()
    try:
        with pytest.raises(CallFailed) as failure:
            a.ask(b)
        assert failure.value.cause is Cause.UNREACHABLE
        # A client that trusted the null CA would be fooled, which is why none does.
        options = [("grpc.ssl_target_name_override", name), ("grpc.use_local_subchannel_pool", 1)]
        trusting = grpc.ssl_channel_credentials(null_ca_pem(), a.leaf.key, a.leaf.certificate)
        with grpc.secure_channel(f"127.0.0.1:{port}", trusting, options=options) as channel:
            assert channel.unary_unary(f"/{SERVICE}/Since")(b"", timeout=60) == b""
        # And a fresh probe is not fooled either.
        with pytest.raises(BadCertificate, match="not signed by the node key"):
            probe(f"127.0.0.1:{port}", 60.0)
    finally:
        fake.stop(None)


def test_a_renewed_certificate_is_shown_and_the_old_record_no_longer_good(make: Callable[[], Node]) -> None:
    a, b = make(), make()
    a.knows(b)
    b.knows(a)
    a.ask(b)
    b.leaf = issue(b.key)
    a.ask(b)
    a.links.close()
    with pytest.raises(CallFailed, match="not the one in the node's record"):
        a.ask(b)
    a.directory.add(b.record(soon()), b"")
    a.ask(b)


def test_nobody_answers(make: Callable[[], Node]) -> None:
    a, b = make(), make()
    with pytest.raises(CallFailed) as failure:
        a.ask(b)
    assert failure.value.cause is Cause.NO_ADDRESS
    a.knows(b)
    b.server.stop()
    with pytest.raises(CallFailed) as failure:
        a.ask(b)
    assert failure.value.cause is Cause.UNREACHABLE


# Certificates as bytes -----------------------------------------------------------------------------------------------


def test_py_libp2p_reads_the_extension() -> None:
    from libp2p.crypto.serialization import deserialize_public_key
    from libp2p.security.tls.certificate import LIBP2P_EXTENSION_OID, decode_signed_key

    key = NodeKey.generate()
    leaf = issue(key)
    certificate = x509.load_pem_x509_certificate(leaf.certificate)
    value = certificate.extensions.get_extension_for_oid(LIBP2P_EXTENSION_OID).value
    assert isinstance(value, x509.UnrecognizedExtension)
    signed = decode_signed_key(value.value)
    assert deserialize_public_key(signed.public_key_bytes).to_bytes() == key.public
    assert identify(leaf.certificate).node_key == key.public


@given(st.binary(max_size=300))
def test_no_bytes_are_a_certificate(raw: bytes) -> None:
    for pem in (raw, b"-----BEGIN CERTIFICATE-----\n" + raw + b"\n-----END CERTIFICATE-----\n"):
        with pytest.raises(BadCertificate):
            identify(pem)


@settings(max_examples=50)
@given(st.binary(max_size=120))
def test_no_extension_is_an_identity(value: bytes) -> None:
    with pytest.raises(BadCertificate):
        identify(forge(extension=value).certificate)


def test_a_private_key_is_not_printed() -> None:
    leaf = issue(NodeKey.generate())
    assert "PRIVATE" not in repr(leaf)
