"""The parts of the NAT ladder one by one, on loopback: sockets, splices, DialBack, standing, punches, rendezvous."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trio
from libp2p.abc import IHost
from libp2p.exceptions import BaseLibp2pError

from psyche_node.faults import Faults
from psyche_node.identity import NodeKey
from psyche_node.network.announcements import Announcements
from psyche_node.network.certificates import issue
from psyche_node.network.directory import Directory
from psyche_node.network.guard import Guard
from psyche_node.network.holdings import Holdings
from psyche_node.network.host import dial, listening, make_host, peer_of
from psyche_node.network.links import CallFailed, Cause, Links, probe
from psyche_node.network.nat.dialback import SEEN_SECONDS, DialBack
from psyche_node.network.nat.paths import SERVER_SOCKET, Paths
from psyche_node.network.nat.puncher import Puncher
from psyche_node.network.nat.reachability import Reachability, Standing
from psyche_node.network.nat.rendezvous import MAX_BYTES, PUNCH, PUNCHED, PUNCHES_AT_ONCE, Refused, Rendezvous
from psyche_node.network.nat.sockets import SocketFolder, connect, local_port, peer_address, punch
from psyche_node.network.nat.splice import Door, Splice
from psyche_node.network.reports import Reporter, Traffic
from psyche_node.network.server import Server
from psyche_node.network.service import NodeService
from psyche_node.network.statements import NodeRecord
from psyche_node.network.store import BlobStore, Reader
from psyche_node.network.wire import node_pb2 as wire

RUN = bytes(32)
pytestmark = pytest.mark.timeout(60)


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
    client.settimeout(20)
    return client


def until(true: Callable[[], bool]) -> None:
    """Wait until a thread has done something; the test's own timeout ends it."""
    while not true():
        threading.Event().wait(0.005)


def test_a_door_leads_one_client_to_the_connection_and_nobody_else_in(folder: SocketFolder) -> None:
    near, far = pair()
    path = folder.path(folder.name())
    door = Door(path, near, 20)
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
        far.settimeout(20)
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
    left_far.settimeout(20)
    with contextlib.suppress(ConnectionError):
        assert left_far.recv(1) == b""
    until(lambda: not splice.alive)
    left_far.close()


def test_two_ports_punch_through_to_each_other() -> None:
    """Simultaneous open on loopback: what is there is a connection that nobody listened for."""
    with socket.create_server(("127.0.0.1", 0)) as helper:
        where = f"127.0.0.1:{helper.getsockname()[1]}"
        ends = [connect(where, 5), connect(where, 5)]
        ports = [local_port(end) for end in ends]
        made: list[socket.socket] = []
        other = threading.Thread(target=lambda: made.append(punch(ports[1], f"127.0.0.1:{ports[0]}", 20)))
        other.start()
        with punch(ports[0], f"127.0.0.1:{ports[1]}", 20) as near:
            other.join()
            assert (local_port(near), near.getpeername()[1]) == tuple(ports)
            near.sendall(b"hello")
            assert made[0].recv(5) == b"hello"
        with pytest.raises(OSError, match=r"refused|within"):
            punch(ports[0], "127.0.0.1:9", 0.2)
        for end in [*ends, *made]:
            end.close()


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


class Node:
    """A node's gRPC ends, with DialBack and paths, on loopback."""

    def __init__(self, folder: Path) -> None:
        self.now = 0.0
        self.key = NodeKey.generate()
        self.leaf = issue(self.key)
        self.directory = Directory(self.key.public)
        self.sockets = SocketFolder(folder / "sockets")
        self.paths = Paths(self.sockets)
        self.dialback = DialBack(probe, lambda: self.now)
        reporter = Reporter(lambda event: None, self.directory.slot)
        reader = Reader(BlobStore(folder / "blobs"))
        announcements = Announcements(RUN, self.directory)
        service = NodeService(
            announcements,
            lambda raw, sender: None,
            Holdings(reader),
            Traffic(),
            Faults(),
            lambda *_: None,
            lambda _: None,
        )
        guard = Guard(self.directory, reporter)
        self.server = Server(
            "127.0.0.1",
            0,
            lambda: self.leaf,
            guard,
            service,
            more=[self.dialback.handlers()],
            unix_path=self.sockets.path(SERVER_SOCKET),
        )
        self.links = Links(lambda: self.leaf, self.directory, reporter, Traffic(), self.paths)

    def record(self, *, private: bool = False, observed_ip: str = "") -> NodeRecord:
        """A private one names an address where nobody answers, as it is for those outside."""
        address = "192.0.2.1:9" if private else f"127.0.0.1:{self.server.port}"
        where = ("/ip4/127.0.0.1/tcp/1",)
        leaf = self.leaf
        return NodeRecord(RUN, self.key.public, 1, where, address, leaf.der_hash, leaf.expires, private, observed_ip)

    def knows(self, *records: NodeRecord) -> None:
        keys = {self.key.public, *(record.node_key for record in records)}
        self.directory.set_members(dict(enumerate(sorted(keys))))
        for record in records:
            self.directory.add(record, b"")

    def ask(self, other: Node, port: int) -> wire.DialBackReply:
        request = wire.DialBackRequest(port=port)
        return self.links.call(other.key.public, "DialBack", request, wire.DialBackReply, 10.0)

    def close(self) -> None:
        self.paths.close()
        self.links.close()
        self.server.stop()
        self.sockets.close()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[], Node]]:
    nodes: list[Node] = []

    def one() -> Node:
        nodes.append(Node(tmp_path / str(len(nodes))))
        return nodes[-1]

    yield one
    for node in nodes:
        node.close()


def meet(*nodes: Node) -> None:
    for node in nodes:
        node.knows(*(other.record() for other in nodes))


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


def record_of(number: int, *, private: bool = False) -> NodeRecord:
    key = bytes([number]) * 32
    return NodeRecord(RUN, key, 1, ("/ip4/192.0.2.1/tcp/1",), "192.0.2.1:2", bytes(32), 1, private)


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


# The punch -----------------------------------------------------------------------------------------------------------


@dataclass
class Trio:
    """A helper, a caller and a private target."""

    helper: Node
    caller: Node
    target: Node

    def punchers(self, made: Callable[[bytes], None]) -> tuple[Puncher, Puncher]:
        def puncher(node: Node) -> Puncher:
            return Puncher(node.paths, node.links, node.directory, lambda: node.leaf, made)

        return puncher(self.caller), puncher(self.target)


@pytest.fixture
def three(make: Callable[[], Node]) -> Trio:
    helper, caller, target = make(), make(), make()
    meet(helper, caller)
    hidden = target.record(private=True, observed_ip="127.0.0.1")
    for node in (helper, caller):
        node.knows(helper.record(), caller.record(), hidden)
    target.knows(helper.record(), caller.record(), hidden)
    return Trio(helper, caller, target)


def run_punch(three: Trio, change: Callable[[wire.Punch], wire.Punch] = lambda reply: reply) -> str:
    """Have the caller want a path; the helper passes on what ``change`` makes of the reply. Returns why not, or ''."""
    outcome: list[str] = []

    async def scenario() -> None:
        caller, target = three.punchers(lambda peer: None)

        async def ask(helper: bytes, peer: bytes, address: str) -> wire.Punch:
            return change(await target._invited(three.caller.key.public, address, helper))

        async with trio.open_nursery() as target._nursery:
            try:
                await caller._through(three.helper.key.public, three.target.key.public, ask)
                outcome.append("")
            except (Refused, OSError) as error:
                outcome.append(str(error))
                target._nursery.cancel_scope.cancel()

    trio.run(scenario)
    return outcome[0]


def since(node: Node, other: Node) -> wire.SinceReply:
    return node.links.call(other.key.public, "Since", wire.SinceRequest(round=1), wire.SinceReply, 10.0)


def test_a_path_carries_calls_and_is_made_again_when_it_broke(three: Trio) -> None:
    for _ in range(2):
        with pytest.raises(CallFailed) as failed:
            since(three.caller, three.target)
        assert failed.value.cause is Cause.PRIVATE
        assert run_punch(three) == ""
        assert three.caller.paths.punched() == {three.target.key.public}
        assert since(three.caller, three.target) == wire.SinceReply()
        path = three.caller.paths.path(three.target.key.public, three.target.leaf.der_hash, ask=False)
        assert path is not None
        three.target.paths.close()
        until(lambda: not path.alive)  # noqa: B023
        assert three.caller.paths.punched() == set()


def test_a_path_is_wanted_for_blobs_only(three: Trio) -> None:
    wanted: list[bytes] = []
    three.caller.paths.on_wanted(wanted.append)
    with pytest.raises(CallFailed):
        since(three.caller, three.target)
    assert wanted == []
    with pytest.raises(CallFailed) as failed:
        three.caller.links.fetch(three.target.key.public, bytes(32), 0, 1, 5.0)
    assert failed.value.cause is Cause.PRIVATE
    assert wanted == [three.target.key.public]


def test_a_helper_cannot_send_anybody_elsewhere(three: Trio, monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(reply: wire.Punch) -> wire.Punch:
        return wire.Punch(address="192.0.2.66:80", certificate=reply.certificate)

    def another(reply: wire.Punch) -> wire.Punch:
        return wire.Punch(address=reply.address, certificate=three.helper.leaf.certificate)

    punched: list[str] = []
    monkeypatch.setattr(
        "psyche_node.network.nat.puncher.punch", lambda port, address, seconds: punched.append(address) or 1 / 0
    )
    monkeypatch.setattr(Puncher, "_meet", _nothing)
    assert "its record says 127.0.0.1" in run_punch(three, elsewhere)
    assert "not the one in its record" in run_punch(three, another)
    # Nor the target, by naming another address of the caller.
    three.target.directory.add(replace(three.caller.record(), seq=2, grpc_address="192.0.2.66:80"), b"")
    assert "its record says 192.0.2.66" in run_punch(three)
    assert punched == []


async def _nothing(*_: object) -> None:
    pass


# The rendezvous over libp2p ------------------------------------------------------------------------------------------


def test_a_helper_helps_members_with_addresses_it_has_seen_and_not_too_often(three: Trio) -> None:
    """The real protocol between three hosts; what the target answers is fixed."""
    caller, target = three.caller, three.target
    invitations: list[tuple[bytes, str, bytes]] = []
    answer = wire.Punch(address="127.0.0.1:7", certificate=b"certificate")

    async def invited(who: bytes, address: str, helper: bytes) -> wire.Punch:
        invitations.append((who, address, helper))
        return answer

    async def not_invited(who: bytes, address: str, helper: bytes) -> wire.Punch:
        raise Refused("not this one")

    async def refusal(address: str) -> str:
        try:
            await asking.ask(three.helper.key.public, target.key.public, address)
        except Refused as error:
            return str(error)
        return ""

    async def scenario() -> None:
        nonlocal asking
        async with contextlib.AsyncExitStack() as stack:
            hosts: dict[str, IHost] = {}
            for name, node, answers in (
                ("helper", three.helper, not_invited),
                ("caller", caller, not_invited),
                ("target", target, invited),
            ):
                hosts[name] = make_host(node.key)
                rendezvous = Rendezvous(hosts[name], node.directory, node.dialback, answers)
                if name == "caller":
                    asking = rendezvous
                port = await stack.enter_async_context(listening(hosts[name], "127.0.0.1", 0))
                if name == "helper":
                    where = f"/ip4/127.0.0.1/tcp/{port}"
            with trio.fail_after(40):
                await dial(hosts["caller"], three.helper.key.public, where, 10)
                assert "no connection of yours" in await refusal("127.0.0.1:6")
                seen = (await trio.to_thread.run_sync(caller.ask, three.helper, 0)).observed
                assert await refusal(seen) == "not connected to it"
                await dial(hosts["target"], three.helper.key.public, where, 10)
                assert "its connections do not come from" in await refusal(seen)
                assert invitations == [(caller.key.public, seen, three.helper.key.public)]
                answer.address = (await trio.to_thread.run_sync(target.ask, three.helper, 0)).observed
                assert await asking.ask(three.helper.key.public, target.key.public, seen) == answer
                answer.Clear()
                answer.refusal = "x" * 5000
                assert set(await refusal(seen)) == {"x"}
                for _ in range(int(PUNCHES_AT_ONCE)):
                    last = await refusal(seen)
                assert last == "too many punches lately"
                # Rubbish is not answered, and what is not a member's neither.
                for frame in (struct.pack(">I", MAX_BYTES + 1), struct.pack(">I", 3) + b"\xff" * 3):
                    assert await answer_to(hosts["caller"], three.helper, frame) == b""
                three.helper.directory.set_members({0: three.helper.key.public})
                before = len(invitations)
                with pytest.raises(BaseLibp2pError):
                    await asking.ask(three.helper.key.public, target.key.public, seen)
                assert len(invitations) == before

    async def answer_to(host: IHost, node: Node, frame: bytes) -> bytes:
        stream = await host.new_stream(peer_of(node.key.public), [PUNCH])
        await stream.write(frame)
        with contextlib.suppress(Exception):
            return await stream.read(100) or b""
        return b""

    asking: Rendezvous
    asking = None  # type: ignore[assignment]
    trio.run(scenario)
    assert PUNCHED != PUNCH
