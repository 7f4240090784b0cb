"""The parts of the NAT ladder one by one, on loopback: sockets, splices, probes, DialBack, standing."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trio
from nat_nodes import Node, meet, record_of, until
from nodes_of_a_test import makers_of

from psyche_node.identity import NodeKey
from psyche_node.network.certificates import identify, issue, null_ca_pem
from psyche_node.network.directory import Directory
from psyche_node.network.fanout import Tree
from psyche_node.network.links import FAR_SECONDS, CallFailed, Cause, probe
from psyche_node.network.nat import sockets
from psyche_node.network.nat.dialback import SEEN_SECONDS
from psyche_node.network.nat.reachability import Reachability, Standing
from psyche_node.network.nat.sockets import SocketFolder, connect, local_port, peer_address, punch
from psyche_node.network.nat.splice import Door, Splice
from psyche_node.network.wire import node_pb2 as wire

pytestmark = pytest.mark.timeout(240)

# Sockets and splices -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["short", "deep/" * 40])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[SocketFolder]:
    made = SocketFolder(tmp_path / request.param)
    yield made
    made.close()


def pair() -> tuple[socket.socket, socket.socket]:
    """Return two ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        return near, listener.accept()[0]


def enter(door: Door) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.connect(door.target.removeprefix("unix:"))
    client.settimeout(60)
    return client


def test_a_door_leads_one_client_to_the_connection_and_nobody_else_in(folder: SocketFolder) -> None:
    near, far = pair()
    path = folder.path(folder.name())
    door = Door(path, near, 60)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o700
    with enter(door) as client, far:
        until(lambda: not os.path.exists(path))
        for sender, receiver, data in ((client, far, os.urandom(1 << 20)), (far, client, os.urandom(1 << 20))):
            threading.Thread(target=sender.sendall, args=(data,), daemon=True).start()
            received = b""
            while len(received) < len(data):
                received += receiver.recv(65536)
            assert received == data
        assert door.alive
        assert door.idle_seconds < 60
    until(lambda: not door.alive)


def test_a_door_that_nobody_enters_closes_and_so_does_one_that_is_closed(folder: SocketFolder) -> None:
    for patience, close in ((0.05, False), (30.0, True)):
        near, far = pair()
        path = folder.path(folder.name())
        door = Door(path, near, patience)
        assert door.alive
        if close:
            door.close()
        far.settimeout(60)
        assert far.recv(1) == b""
        until(lambda: not os.path.exists(path))  # noqa: B023
        assert not door.alive
        far.close()


def test_a_splice_ends_when_one_of_its_ends_does() -> None:
    (left, left_far), (right, right_far) = pair(), pair()
    splice = Splice(left, right)
    left_far.sendall(b"through")
    assert right_far.recv(7) == b"through"
    right_far.close()
    left_far.settimeout(60)
    with contextlib.suppress(ConnectionError):
        assert left_far.recv(1) == b""
    until(lambda: not splice.alive)
    left_far.close()


def test_two_ports_punch_through_to_each_other() -> None:
    """Simultaneous open on loopback: what is there is a connection that nobody listened for."""
    with socket.create_server(("127.0.0.1", 0)) as helper:
        where = f"127.0.0.1:{helper.getsockname()[1]}"
        ends = [connect(where, 60), connect(where, 60)]
        ports = [local_port(end) for end in ends]
        made: list[socket.socket] = []
        other = threading.Thread(target=lambda: made.append(punch(ports[1], f"127.0.0.1:{ports[0]}", 60)))
        other.start()
        with punch(ports[0], f"127.0.0.1:{ports[1]}", 60) as near:
            other.join()
            assert (local_port(near), near.getpeername()[1]) == tuple(ports)
            near.sendall(b"hello")
            assert made[0].recv(5) == b"hello"
        with pytest.raises(OSError, match=r"refused|within"):
            punch(ports[0], "127.0.0.1:9", 0.2)
        for end in [*ends, *made]:
            end.close()


def test_a_punch_that_is_refused_is_repeated_only_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has others punch at a stranger does not flood it with that."""
    begun: list[str] = []
    begin = sockets._begun
    monkeypatch.setattr(sockets, "_RETRY_SECONDS", (0.001,) * 3)
    monkeypatch.setattr(sockets, "_begun", lambda address, port: begun.append(address) or begin(address, port))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = local_port(server)
    with pytest.raises(OSError, match="refused"):
        punch(port, "127.0.0.1:9", 1.0)
    assert len(begun) == 4


def test_an_address_without_a_route_is_no_path() -> None:
    """Connecting fails at once there, and the socket that was not connected looks like one that is."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = local_port(server)
    with pytest.raises(OSError, match="unreachable"):
        punch(port, "255.255.255.255:9", 0.2)


def test_a_near_node_that_did_not_answer_is_tried_again_later(make: Callable[[], Node]) -> None:
    """It may only have been starting anew; that it is in another network is a guess that is made for a while."""
    caller, near = make(), make()
    now = 0.0
    caller.links._clock = lambda: now
    silent = near.record(private=True, observed_ip="192.0.2.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        silent = replace(silent, grpc_address=f"127.0.0.1:{local_port(server)}")
    caller.knows(caller.record(private=True, observed_ip="192.0.2.1"), silent)

    def cause() -> Cause | None:
        try:
            caller.ask(near, 0)
        except CallFailed as error:
            return error.cause
        return None

    assert [cause(), cause()] == [Cause.UNREACHABLE, Cause.PRIVATE]
    now += FAR_SECONDS
    assert [cause(), cause()] == [Cause.UNREACHABLE, Cause.PRIVATE]
    now += FAR_SECONDS
    assert cause() is Cause.PRIVATE
    now += FAR_SECONDS
    # It is there after all, and nothing is held against it.
    near.knows(caller.record())
    answering = replace(silent, seq=2, grpc_address=f"127.0.0.1:{near.server.port}")
    caller.directory.add(answering, b"")
    assert cause() is None


@pytest.mark.parametrize(
    ("said", "address"),
    [
        ("ipv4:192.0.2.7:5000", "192.0.2.7:5000"),
        ("ipv6:%5B2001:db8::1%5D:5000", "[2001:db8::1]:5000"),
        ("ipv6:[::ffff:192.0.2.7]:5000", "192.0.2.7:5000"),
        ("unix:", None),
        ("unix:/run/a.sock", None),
        ("ipv4:nonsense", None),
        ("", None),
    ],
)
def test_where_a_call_comes_from(said: str, address: str | None) -> None:
    assert peer_address(said) == address


# DialBack ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[], Node]]:
    yield from makers_of(Node, tmp_path)


def test_dialback_says_where_a_call_comes_from_and_who_answers_there(make: Callable[[], Node]) -> None:
    helper, caller, other = make(), make(), make()
    meet(helper, caller, other)
    seen = caller.ask(helper, 0)
    assert not seen.reached
    assert seen.observed.startswith("127.0.0.1:")
    assert helper.dialback.seen_at(caller.key.public, seen.observed)
    assert not helper.dialback.seen_at(other.key.public, seen.observed)
    assert not helper.dialback.seen_at(caller.key.public, "127.0.0.1:1")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        # Its own server, another member's server at the same address, and nobody.
        for port, reached in ((caller.server.port, True), (other.server.port, False), (closed.getsockname()[1], False)):
            helper.now += 10
            assert caller.ask(helper, port).reached is reached
    helper.now += SEEN_SECONDS + 1
    assert not helper.dialback.seen_at(caller.key.public, seen.observed)


def test_dials_are_paced_and_ports_are_ports(make: Callable[[], Node]) -> None:
    helper, caller = make(), make()
    meet(helper, caller)
    assert caller.ask(helper, caller.server.port).reached
    with pytest.raises(CallFailed) as failed:
        caller.ask(helper, caller.server.port)
    assert failed.value.cause is Cause.BUSY
    # To be told where a call comes from costs nothing.
    assert caller.ask(helper, 0).observed
    for port in (65536, 2**32 - 1):
        with pytest.raises(CallFailed, match="port"):
            caller.ask(helper, port)


def test_a_probe_shows_who_it_is_from(tmp_path: Path) -> None:
    """A server that asks for a certificate and gets none counts a refused handshake."""
    server, client = issue(NodeKey.generate()), NodeKey.generate()
    pem = tmp_path / "server.pem"
    pem.write_bytes(server.certificate + server.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    context.load_verify_locations(cadata=null_ca_pem().decode())
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    shown: list[bytes | None] = []

    def serve(listener: socket.socket) -> None:
        connection = listener.accept()[0]
        try:
            with context.wrap_socket(connection, server_side=True) as accepted:
                shown.append(accepted.getpeercert(binary_form=True))
        except ssl.SSLError:
            shown.append(None)

    for own in (issue(client), None):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            serving = threading.Thread(target=serve, args=(listener,))
            serving.start()
            found = probe(f"127.0.0.1:{listener.getsockname()[1]}", 60.0, own)
            assert found.der_hash == server.der_hash
            serving.join(60)
    certificate, nothing = shown
    assert certificate is not None
    assert identify(ssl.DER_cert_to_PEM_cert(certificate).encode()).node_key == client.public
    assert nothing is None


# What a node makes of the answers ------------------------------------------------------------------------------------


@dataclass
class Answers:
    """Stands for the links to helpers: what each of them says, in turn; None is a failed call."""

    observed: str
    reached: list[bool | None]

    def call(
        self, peer: bytes, method: str, request: wire.DialBackRequest, reply: object, timeout: float
    ) -> wire.DialBackReply:
        if not request.port:
            return wire.DialBackReply(observed=self.observed)
        reached = self.reached.pop()
        if reached is None:
            raise CallFailed(Cause.BUSY, "busy")
        return wire.DialBackReply(observed=self.observed, reached=reached)


def standings_of(setting: str, observed: str, reached: list[bool | None]) -> list[Standing]:
    """Return the standings that a node with interface address 10.0.0.5 goes through."""
    directory = Directory(bytes(32))
    directory.set_members({number: bytes([number]) * 32 for number in range(5)})
    for number in (1, 2, 3):
        directory.add(record_of(number), b"")
    # Nobody asks one that is private itself.
    directory.add(record_of(4, private=True), b"")
    seen: list[Standing] = []

    async def changed() -> None:
        seen.append(node.standing)

    node = Reachability(setting, "10.0.0.5", Answers(observed, reached), directory, changed)  # type: ignore[arg-type]
    seen.append(node.standing)

    async def check() -> None:
        await node._check(4000)

    trio.run(check)
    return seen


@pytest.mark.parametrize(
    ("setting", "observed", "reached", "standings"),
    [
        # Seen at its own address: public until nobody reaches it there, as behind a firewall.
        ("auto", "10.0.0.5:77", [True, True, True], [Standing(), Standing(False, "10.0.0.5")]),
        ("auto", "10.0.0.5:77", [False, False, True], [Standing(), Standing(True, "10.0.0.5")]),
        # Seen elsewhere: private until most have reached it there, as with forwarded ports or a cloud's addresses.
        ("auto", "203.0.113.9:77", [False] * 3, [Standing(), Standing(True, "203.0.113.9")]),
        (
            "auto",
            "203.0.113.9:77",
            [True, False, True],
            [Standing(), Standing(True, "203.0.113.9"), Standing(False, "203.0.113.9")],
        ),
        # A half is not most, and those who did not answer do not count.
        ("auto", "203.0.113.9:77", [True, False, None], [Standing(), Standing(True, "203.0.113.9")]),
        ("auto", "10.0.0.5:77", [None, None, True], [Standing(), Standing(False, "10.0.0.5")]),
        ("auto", "10.0.0.5:77", [None] * 3, [Standing()]),
        ("no", "203.0.113.9:77", [True] * 3, [Standing(True), Standing(True, "203.0.113.9")]),
    ],
)
def test_what_a_node_takes_itself_for(
    setting: str, observed: str, reached: list[bool | None], standings: list[Standing]
) -> None:
    assert standings_of(setting, observed, reached) == standings


# What others make of it ----------------------------------------------------------------------------------------------


def test_private_members_are_leaves_of_the_trees_and_their_blobs_go_to_public_ones() -> None:
    keys = [bytes([number]) * 32 for number in range(16)]
    for author in (0, 12):
        tree = Tree(author, keys[author], keys, keys[10:])
        inner = [key for key in keys if tree.children(key)]
        assert len(inner) == 8
        assert set(inner) <= {keys[author], *keys[:10]}
        plain = Tree(author, keys[author], keys)
        public = [key for key in plain.order if key in keys[:10]]
        assert [key for key in tree.order if key in keys[:10]] == public, "the order is another one"
        if author == 12:
            assert tree.children(keys[author]) == public[:2]


def test_who_is_reachable_depends_on_records_networks_and_paths() -> None:
    directory = Directory(bytes([1]) * 32)
    directory.set_members({number: bytes([number]) * 32 for number in range(1, 5)})
    plain, private = record_of(2), record_of(3, private=True)
    near = replace(record_of(4, private=True), observed_ip="203.0.113.9")
    for record in (plain, private, near):
        directory.add(record, b"")

    def reachable() -> list[bool]:
        return [directory.reachable(record.node_key) for record in (plain, private, near)]

    assert reachable() == [True, False, False]
    # Behind the same NAT.
    directory.add(replace(record_of(1, private=True), observed_ip="203.0.113.9"), b"")
    assert directory.own_private()
    assert reachable() == [True, False, True]
    directory.on_paths(lambda key: key == private.node_key)
    assert reachable() == [True, True, True]
    assert not directory.reachable(bytes(32))
    assert directory.private() == {bytes([number]) * 32 for number in (1, 3, 4)}
    assert directory.public(directory.others().values()) == [plain.node_key]
