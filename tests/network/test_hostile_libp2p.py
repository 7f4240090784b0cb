"""What a hostile peer can cost the libp2p side: each attack has a bound, and members are served meanwhile.

The victim is a whole network node in this process, on the same event loop as its attackers.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from libp2p.abc import IHost
from libp2p.custom_types import TProtocol
from libp2p.host.exceptions import StreamFailure
from libp2p.host.ping import ID as PING
from libp2p.network.stream.exceptions import StreamError
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V12
from libp2p.pubsub.pb import rpc_pb2
from libp2p.stream_muxer.yamux.yamux import Yamux
from network_driver import RUN

from psyche_node.identity import NodeKey
from psyche_node.ipc import Message
from psyche_node.network import gate, host, records, swarm
from psyche_node.network.guard import Pace
from psyche_node.network.host import dial, listening, make_host, network_of, peer_of
from psyche_node.network.messages import (
    Announced,
    Configure,
    GetStats,
    MemberEntry,
    PeerDown,
    PeerUp,
    SetMembers,
    Stats,
    Why,
)
from psyche_node.network.node import NetworkNode
from psyche_node.network.statements import Announcement, parse_bootstrap

pytestmark = pytest.mark.timeout(240)
PATIENCE = 60.0
HANDSHAKE = b"\x13/multistream/1.0.0\n\x07/noise\n"


class Victim:
    """A node that is running, and what its attackers need."""

    def __init__(self, node: NetworkNode, multiaddr: str, events: list[Message]) -> None:
        self.node, self.events = node, events
        self.key, self.address = parse_bootstrap(multiaddr)
        self.port = int(self.address.rpartition("/")[2])

    def connections(self) -> int:
        return len(network_of(self.node._swarm._host).get_connections())

    def refused(self, what: str, why: Why) -> int:
        counts = self.node._reporter.refusals()
        return sum(one.count for one in counts if (one.what, one.why) == (what, why))

    async def members(self, *keys: NodeKey) -> None:
        entries = [MemberEntry(slot=slot, node_key=key.public.hex()) for slot, key in enumerate(keys)]
        await self.node.handle(SetMembers(members=entries))

    async def tcp(self, source: str = "127.0.0.2") -> trio.SocketStream:
        """A connection from another address than that of the honest ones."""
        sock = trio.socket.socket()
        await sock.bind((source, 0))
        await sock.connect(("127.0.0.1", self.port))
        return trio.SocketStream(sock)

    @contextlib.asynccontextmanager
    async def peer(self, key: NodeKey | None = None) -> AsyncIterator[IHost]:
        """A peer with a connection: a stranger, unless its key is a member's."""
        attacker = make_host(key or NodeKey.generate())
        async with listening(attacker, "127.0.0.1", 0):
            await dial(attacker, self.key, self.address, PATIENCE)
            try:
                yield attacker
            finally:
                # The end of a host does not close its sockets; that of its process would.
                with trio.move_on_after(5) as scope:
                    scope.shield = True
                    await network_of(attacker).close_peer(peer_of(self.key))

    async def answers(self) -> None:
        """It answers a newcomer's ping."""
        async with self.peer() as newcomer:
            stream = await newcomer.new_stream(peer_of(self.key), [PING])
            await stream.write(bytes(32))
            with trio.fail_after(PATIENCE):
                assert await stream.read(32) == bytes(32)


def attack(tmp_path: Path, scenario: Callable[[Victim], Awaitable[None]]) -> None:
    """Run a victim, and the scenario against it."""

    async def run() -> None:
        events: list[Message] = []
        configure = Configure(folder=str(tmp_path), node_key_path=str(tmp_path / "node.key"), run=RUN.hex())
        node = NetworkNode(configure, events.append)
        with trio.fail_after(PATIENCE):
            async with node.running() as ready:
                await scenario(Victim(node, ready.multiaddrs[0], events))

    trio.run(run)


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(PATIENCE):
        while not condition():
            await trio.sleep(0.02)


async def ended(stream: trio.SocketStream) -> None:
    """Wait until the victim has closed the connection, after whatever it had to say."""
    with contextlib.suppress(trio.BrokenResourceError):
        while await stream.receive_some():
            pass


def gone(attacker: IHost, victim: Victim) -> bool:
    return not network_of(attacker).get_connections(peer_of(victim.key))


def muxer_of(attacker: IHost, victim: Victim) -> Yamux:
    muxer = network_of(attacker).get_connections(peer_of(victim.key))[0].muxed_conn
    assert isinstance(muxer, Yamux)
    return muxer


async def turned_away(attacker: IHost, victim: Victim) -> bool:
    """Whether a stream of the record protocol is reset before anything is sent in it."""
    try:
        stream = await attacker.new_stream(peer_of(victim.key), [TProtocol(records.PROTOCOL)])
        await stream.read(1)
    except (StreamFailure, StreamError):
        return True
    return False


def test_handshakes_that_never_end_are_bounded_and_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "HANDSHAKE_SECONDS", 2.0)

    async def scenario(victim: Victim) -> None:
        stalled = [await victim.tcp() for _ in range(gate.HANDSHAKES_PER_ADDRESS + 10)]
        for number, stream in enumerate(stalled):
            with contextlib.suppress(trio.BrokenResourceError):
                # Silence; multistream and silence; Noise that announces a message and stops within it.
                await stream.send_all([b"", HANDSHAKE, HANDSHAKE + b"\xff\xff" + bytes(100)][number % 3])
        await until(lambda: victim.refused("connection", Why.TOO_MANY) == 10)
        # From another address one comes in while these wait.
        await victim.answers()
        for stream in stalled:
            await ended(stream)
        await until(lambda: victim.refused("handshake", Why.PROTOCOL) == gate.HANDSHAKES_PER_ADDRESS)

    attack(tmp_path, scenario)


def test_an_ended_connection_gives_its_place_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """py-libp2p keeps it: after as many connections as there are places nobody would come in any more."""
    monkeypatch.setattr(host, "MAX_CONNECTIONS", 6)

    async def scenario(victim: Victim) -> None:
        for _ in range(10):
            await victim.answers()
            await until(lambda: victim.connections() == 0)

    attack(tmp_path, scenario)


def test_a_storm_of_connections_is_let_in_slowly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "CONNECTIONS_PER_SECOND", 0.01)
    monkeypatch.setattr(gate, "CONNECTIONS_AT_ONCE", 5.0)

    async def scenario(victim: Victim) -> None:
        for _ in range(300):
            async with await victim.tcp():
                pass
        await until(lambda: victim.refused("connection", Why.TOO_MANY) == 295)
        await victim.answers()

    attack(tmp_path, scenario)


def test_strangers_do_not_crowd_out_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swarm, "MAX_STRANGERS", 3)
    member = NodeKey.generate()

    async def scenario(victim: Victim) -> None:
        await victim.members(member)
        async with contextlib.AsyncExitStack() as stack:
            friend = await stack.enter_async_context(victim.peer(member))
            for _ in range(10):
                await stack.enter_async_context(victim.peer())
            await until(lambda: victim.refused("connection", Why.TOO_MANY) >= 7 and victim.connections() == 4)
            assert not gone(friend, victim)

    attack(tmp_path, scenario)


def test_bytes_that_nobody_reads_end_the_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that sends beyond the window it was granted; the victim's answers cannot leave, so it stops reading."""

    async def scenario(victim: Victim) -> None:
        async with victim.peer() as attacker:
            stream: Any = await attacker.new_stream(peer_of(victim.key), [PING])
            stream.muxed_stream.send_window = 1 << 40
            sent = 0
            with trio.fail_after(PATIENCE), contextlib.suppress(Exception):
                while not gone(attacker, victim):
                    await stream.write(bytes(32_768))
                    sent += 32_768
            await until(lambda: victim.refused("connection", Why.TOO_MANY) == 1)
            assert sent < 4 * gate.MAX_UNREAD_OF_STRANGER
        await victim.answers()

    attack(tmp_path, scenario)


def test_a_frame_that_announces_megabytes_ends_the_connection(tmp_path: Path) -> None:
    async def scenario(victim: Victim) -> None:
        async with victim.peer() as attacker:
            stream: Any = await attacker.new_stream(peer_of(victim.key), [PING])
            head = struct.pack(">BBHII", 0, 0, 0, stream.muxed_stream.stream_id, gate.MAX_UNREAD_OF_STRANGER + 1)
            await muxer_of(attacker, victim).secured_conn.write(head)
            await until(lambda: gone(attacker, victim))
            assert victim.refused("connection", Why.TOO_MANY) == 1

    attack(tmp_path, scenario)


def test_streams_without_number_end_the_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "MAX_STREAMS", 30)

    async def scenario(victim: Victim) -> None:
        async with victim.peer() as attacker:
            muxer = muxer_of(attacker, victim)
            with contextlib.suppress(Exception):
                for number in range(1001, 1201, 2):
                    await muxer.secured_conn.write(struct.pack(">BBHII", 0, 1, 1, number, 0))
            await until(lambda: gone(attacker, victim))
            assert victim.refused("connection", Why.TOO_MANY) >= 1
        await victim.answers()

    attack(tmp_path, scenario)


def test_an_exchange_of_records_that_dribbles_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "SECONDS", 1.0)

    async def scenario(victim: Victim) -> None:
        exchange = victim.node._swarm._records
        key = NodeKey.generate()
        async with victim.peer(key) as attacker:
            streams = []
            while exchange._serving.count(key.public) < records.MAX_SERVED_PER_PEER:
                stream = await attacker.new_stream(peer_of(victim.key), [TProtocol(records.PROTOCOL)])
                await stream.write(struct.pack(">I", records.MAX_BYTES))
                streams.append(stream)
            # One more is turned away at once, and nothing of it is kept.
            assert await turned_away(attacker, victim)
            with trio.fail_after(PATIENCE), contextlib.suppress(Exception):
                while exchange._serving.count(key.public):
                    for stream in streams:
                        await stream.write(b"\0")
                    await trio.sleep(0.1)
            await until(lambda: exchange._serving.count(key.public) == 0)
        await victim.answers()

    attack(tmp_path, scenario)


def test_one_peer_does_not_take_all_places_of_the_exchange_of_records(tmp_path: Path) -> None:
    async def scenario(victim: Victim) -> None:
        async with victim.peer() as attacker, victim.peer() as newcomer:
            for _ in range(records.MAX_SERVED_AT_ONCE):
                # Those that are too many are reset, at once.
                with contextlib.suppress(StreamFailure, StreamError):
                    stream = await attacker.new_stream(peer_of(victim.key), [TProtocol(records.PROTOCOL)])
                    await stream.write(struct.pack(">I", records.MAX_BYTES))
            stream = await newcomer.new_stream(peer_of(victim.key), [TProtocol(records.PROTOCOL)])
            await stream.write(struct.pack(">I", 0))
            assert len(await stream.read(4)) == 4

    attack(tmp_path, scenario)


def test_gossip_is_taken_of_members_alone_and_on_its_two_topics(tmp_path: Path) -> None:
    """A topic too many makes a new message of an old one, and py-libp2p keeps the names of all topics."""
    member, stranger = NodeKey.generate(), NodeKey.generate()

    async def scenario(victim: Victim) -> None:
        await victim.members(member)
        gossip = victim.node._swarm.gossip
        raw = Announcement(RUN, 1, member.public, bytes(32), 1).sign(member)
        topic = gossip._announcements
        for topics in ([topic, "x"], ["x"], [topic, topic], []):
            message = rpc_pb2.Message(data=raw, topicIDs=topics)
            await gossip._pubsub.push_msg(peer_of(member.public), message)
        right = rpc_pb2.Message(data=raw, topicIDs=[topic])
        await gossip._pubsub.push_msg(peer_of(stranger.public), right)
        assert not any(isinstance(event, Announced) for event in victim.events)
        assert victim.refused("announcement", Why.MALFORMED) == 4
        assert victim.refused("announcement", Why.NOT_A_MEMBER) == 1
        await gossip._pubsub.push_msg(peer_of(member.public), right)
        assert Announced(round=1, member=0, digest=bytes(32).hex(), length=1) in victim.events
        assert "x" not in {*gossip._router.time_since_last_publish, *gossip._router.recent_message_deliveries}

    attack(tmp_path, scenario)


def test_what_is_written_around_a_statement_keeps_no_other_from_being_passed_on(tmp_path: Path) -> None:
    """py-libp2p drops a message with the author and number of another one, or one that claims to be its own."""
    member, author = NodeKey.generate(), NodeKey.generate()

    async def scenario(victim: Victim) -> None:
        await victim.members(member, author)
        gossip = victim.node._swarm.gossip
        statements = []
        for round, claimed in enumerate((author.public, author.public, victim.key)):
            raw = Announcement(RUN, round, member.public, bytes(32), 1).sign(member)
            around = {"from_id": peer_of(claimed).to_bytes(), "seqno": b"1", "key": bytes(1000)}
            message = rpc_pb2.Message(data=raw, topicIDs=[gossip._announcements], **around)
            await gossip._pubsub.push_msg(peer_of(member.public), message)
            statements.append(raw)
        passed_on = [one for one in gossip._router.mcache.msgs.values() if one.data in statements]
        assert [one.data for one in passed_on] == statements
        assert not any(one.key for one in passed_on)

    attack(tmp_path, scenario)


def test_strangers_have_no_place_in_the_mesh_of_gossip(tmp_path: Path) -> None:
    keys = [NodeKey.generate().public for _ in range(10)]
    peers = [peer_of(key) for key in keys]

    async def scenario(victim: Victim) -> None:
        gossip = victim.node._swarm.gossip
        router, topic = gossip._router, gossip._announcements

        def mesh(*members: bytes) -> set[ID]:
            victim.node._directory.set_members(dict(enumerate(members)))
            router.mesh_heartbeat()
            return router.mesh[topic]

        for peer in peers:
            router.add_peer(peer, PROTOCOL_ID_V12)
            gossip._pubsub.peer_topics.setdefault(topic, set()).add(peer)
            await router.on_peer_subscribed(peer, topic)
            rpc = rpc_pb2.RPC()
            rpc.control.graft.add(topicID=topic)
            await router.handle_rpc(rpc, peer)
        assert mesh() == set()
        # It has one as soon as it is known for a member, and none when it is none any more.
        assert mesh(*keys[:4]) == set(peers[:4])
        assert mesh(*keys[2:6]) == set(peers[2:6])
        assert mesh(keys[9]) == {peers[9]}
        # A member's prune of another topic is not remembered, either.
        rpc = rpc_pb2.RPC()
        rpc.control.prune.add(topicID="x")
        await router.handle_rpc(rpc, peers[9])
        assert "x" not in router.back_off

    attack(tmp_path, scenario)


def test_the_statistics_of_a_node_do_not_grow_with_the_strangers_it_meets(tmp_path: Path) -> None:
    member = NodeKey.generate()

    async def scenario(victim: Victim) -> None:
        await victim.members(member)
        before = await victim.node.handle(GetStats())
        for number in range(1000):
            victim.node.intake.gossip_bytes(number.to_bytes(32), 2, 3)
        victim.node.intake.gossip_bytes(member.public, 5, 7)
        stats = await victim.node.handle(GetStats())
        assert isinstance(stats, Stats)
        assert isinstance(before, Stats)
        assert [(one.slot, one.bytes_sent, one.bytes_received) for one in stats.per_peer] == [(0, 5, 7)]
        assert (stats.bytes_sent - before.bytes_sent, stats.bytes_received - before.bytes_received) == (2005, 3007)
        # Who has left is counted with the others.
        await victim.members()
        left = await victim.node.handle(GetStats())
        assert isinstance(left, Stats)
        assert (left.per_peer, left.bytes_sent) == ([], stats.bytes_sent)

    attack(tmp_path, scenario)


def test_a_rotated_key_is_a_strangers(tmp_path: Path) -> None:
    """The slot goes on under another key: the old one's connection is no member's any more, the new one's is."""
    old, new = NodeKey.generate(), NodeKey.generate()

    async def scenario(victim: Victim) -> None:
        await victim.members(old)
        async with victim.peer(old), victim.peer(new):
            await until(lambda: PeerUp(slot=0) in victim.events)
            victim.events.clear()
            assert not victim.node._swarm._is_member(peer_of(new.public))
            await victim.members(new)
            await until(lambda: victim.node._up == {0})
            assert not victim.node._swarm._is_member(peer_of(old.public))
            assert victim.node._swarm._is_member(peer_of(new.public))
        await until(lambda: PeerDown(slot=0) in victim.events)

    attack(tmp_path, scenario)


def test_the_gate_counts_by_address() -> None:
    pace = Pace(rate=0.0, burst=2.0)
    assert [pace.allows(b"192.0.2.1") for _ in range(3)] == [True, True, False]
    assert pace.allows(b"192.0.2.2")
