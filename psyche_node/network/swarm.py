"""The libp2p side: connections to the members, gossip, exchange of node records, and pings. Runs on trio.

TCP, Noise and Yamux only: py-libp2p's QUIC loses data and mplex resets slow readers. Other settings that differ from
py-libp2p's defaults each have a reason beside them.
"""

from __future__ import annotations

import contextlib
import logging
import random
import secrets
import struct
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Protocol

import trio
from google.protobuf.message import DecodeError
from libp2p import new_host
from libp2p.abc import IHost, INetConn, INetStream, INetwork, INotifee
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key
from libp2p.custom_types import TProtocol
from libp2p.host.ping import ID as PING
from libp2p.identity_utils import create_identity_from_seed
from libp2p.io.utils import read_exactly
from libp2p.network.config import ConnectionConfig
from libp2p.network.swarm import Swarm as Network
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID, PROTOCOL_ID_V11, PROTOCOL_ID_V12, GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.rcmgr.manager import ResourceLimits, ResourceManager
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as Noise
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.tools.anyio_service import background_trio_service
from libp2p.transport.tcp.tcp import TCP
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from psyche_node.identity import IdentityError, NodeKey, node_id, public_key
from psyche_node.network.directory import Directory
from psyche_node.network.statements import Malformed, join_multiaddr, split_multiaddr
from psyche_node.network.wire import node_pb2 as wire

log = logging.getLogger(__name__)
RECORDS = TProtocol("/psyche/records/1")
MAX_RECORDS_BYTES = 1 << 20
MAX_RECORDS = 300
MAX_CONNECTIONS = 128
# Connections of nodes that are not members (yet): they may ask for records, and not crowd out the members.
MAX_STRANGERS = 32
# A node keeps connections to this many members; gossip reaches the others.
WANTED_CONNECTIONS = 32
# One Yamux frame and its header then fill exactly one Noise message; larger writes cost twice the CPU.
WRITE_BYTES = 65_507
DIAL_SECONDS = 5.0
EXCHANGE_SECONDS = 10.0
PING_EVERY = 5.0
PING_MISSES = 3
_LENGTH = struct.Struct(">I")


class Handlers(Protocol):
    """What the swarm tells the node."""

    def gossip_announcement(self, raw: bytes, forwarder: bytes | str) -> bool:
        """Take an announcement from gossip; return whether to pass it on."""

    def gossip_record(self, raw: bytes, forwarder: bytes | str) -> bool:
        """Take a node record from gossip; return whether to pass it on."""

    def records_received(self, raw: list[bytes], sender: bytes) -> list[bytes]:
        """Take the records of a peer; return those that were new."""

    def connection_changed(self, peer: bytes, up: bool) -> None:
        """The first connection to ``peer`` came up, or the last one went down."""

    def gossip_bytes(self, peer: bytes, sent: int, received: int) -> None:
        """Count bytes that went over libp2p."""


@dataclass(slots=True)
class _Dial:
    """When to try a peer again: after 1, 2, 4 .. 30 seconds, with jitter."""

    failures: int = 0
    due: float = 0.0

    def failed(self, now: float) -> None:
        self.failures += 1
        self.due = now + min(30.0, 2.0 ** (self.failures - 1)) * random.uniform(0.8, 1.2)


@dataclass(slots=True)
class _Topics:
    announcements: str
    records: str


@dataclass(slots=True)
class _Ping:
    misses: int = 0
    stream: INetStream | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class Swarm:
    """One libp2p host. Create it, then enter ``running``; everything else needs the host to run."""

    def __init__(
        self, key: NodeKey, run: bytes, directory: Directory, handlers: Handlers, bootstrap: list[tuple[bytes, str]]
    ) -> None:
        """``bootstrap``: (node key, multiaddr without /p2p) of nodes to start from."""
        self._key, self._directory, self._handlers, self._bootstrap = key, directory, handlers, bootstrap
        prefix = f"/psyche/1/{run.hex()[:32]}"
        self._topics = _Topics(f"{prefix}/announcements", f"{prefix}/records")
        self._host = _make_host(key)
        self._network = self._host.get_network()
        self._network.register_notifee(_Notifee(self._connected, self._disconnected))
        self._host.set_stream_handler(RECORDS, self._serve_records)
        self._router = GossipSub(
            [PROTOCOL_ID_V12, PROTOCOL_ID_V11, PROTOCOL_ID],
            degree=4,
            degree_low=3,
            degree_high=6,
            heartbeat_interval=1,  # the default is 120 s
            spam_protection_enabled=False,  # it drops all but 10 messages a second and forwarder, without an error
            eclipse_protection_enabled=False,  # it wants three IP networks in the mesh; members are on a list anyway
            adaptive_gossip_enabled=False,
        )
        self._pubsub = Pubsub(
            self._host,
            self._router,
            msg_id_constructor=lambda message: message.data,  # a statement has one encoding; see Malformed
            validation_cache_ttl=1,  # a refusal must not outlive the next list of members
            max_inbound_rpc_size=256 * 1024,
            max_subscriptions_per_peer=8,
            allowed_topics={self._topics.announcements, self._topics.records},
        )
        self._pubsub.set_topic_validator(self._topics.announcements, self._validate_announcement, False)
        self._pubsub.set_topic_validator(self._topics.records, self._validate_record, False)
        self._dials: dict[bytes, _Dial] = {}
        self._pings: dict[bytes, _Ping] = {}
        self._changed = trio.Event()
        self._serving = trio.CapacityLimiter(16)

    @property
    def port(self) -> int:
        """The TCP port it listens on."""
        return int(self._host.get_transport_addrs()[0].value_for_protocol("tcp"))

    @contextlib.asynccontextmanager
    async def running(self, host: str, port: int) -> AsyncIterator[trio.Nursery]:
        """Listen on ``host``:``port`` (0: any port) and keep connections. Raises OSError when it cannot listen."""
        async with (
            self._host.run([Multiaddr(join_multiaddr(host, port))]),
            background_trio_service(self._pubsub),
            background_trio_service(self._router),
        ):
            if not self._host.get_transport_addrs():
                raise OSError(f"libp2p cannot listen on {host} port {port}. Is the port taken?")
            await self._pubsub.wait_until_ready()
            async with trio.open_nursery() as nursery:
                for topic in (self._topics.announcements, self._topics.records):
                    nursery.start_soon(self._drain, topic)
                nursery.start_soon(self._keep_connections, nursery)
                nursery.start_soon(self._keep_records)
                yield nursery
                nursery.cancel_scope.cancel()

    def connected(self) -> set[bytes]:
        """Return the keys of all peers with a connection."""
        return {key for peer in self._network.get_connections_map() if (key := _key(peer)) is not None}

    async def gossip_announcement(self, raw: bytes) -> None:
        await self._publish(self._topics.announcements, raw)

    async def gossip_record(self, raw: bytes) -> None:
        await self._publish(self._topics.records, raw)

    def wake(self) -> None:
        """Look at members and records again at once."""
        self._changed.set()

    # Connections -----------------------------------------------------------------------------------------------------

    async def _keep_connections(self, nursery: trio.Nursery) -> None:
        while True:
            self._changed = trio.Event()
            now = trio.current_time()
            connected = self.connected()
            for key, addresses in self._targets(connected):
                dial = self._dials.setdefault(key, _Dial())
                if dial.due <= now:
                    dial.due = now + DIAL_SECONDS * len(addresses) + 1.0
                    nursery.start_soon(self._dial, key, addresses, dial)
            for key in connected:
                if self._is_ours(key) and key not in self._pings:
                    self._pings[key] = ping = _Ping()
                    nursery.start_soon(self._keep_pinging, key, ping)
            await self._drop_strangers(connected)
            with trio.move_on_after(1.0):
                await self._changed.wait()

    def _is_ours(self, key: bytes) -> bool:
        return self._directory.slot(key) is not None or any(key == known for known, _ in self._bootstrap)

    def _targets(self, connected: set[bytes]) -> list[tuple[bytes, list[str]]]:
        others = self._directory.others()
        wanted = sorted(
            others.values(), key=lambda key: bytes(a ^ b for a, b in zip(key, self._key.public, strict=True))
        )
        targets: dict[bytes, list[str]] = {}
        for key in wanted[:WANTED_CONNECTIONS]:
            record = self._directory.record(key)
            if key in connected or record is None:
                continue
            # Of two nodes one dials and the other waits a little, so that there is one connection and not two.
            if self._key.public > key and key not in self._dials:
                self._dials[key] = _Dial(due=trio.current_time() + 3.0)
            targets[key] = list(record.p2p_addresses)
        # The bootstrap nodes are for those who know too few others.
        if len(connected) < 2 or any(self._directory.record(key) is None for key in others.values()):
            for key, address in self._bootstrap:
                if key not in connected and key != self._key.public and address not in targets.setdefault(key, []):
                    targets[key].append(address)
        return list(targets.items())

    async def _dial(self, key: bytes, addresses: list[str], dial: _Dial) -> None:
        peer = ID.from_base58(node_id(key))
        network = self._network
        assert isinstance(network, Network)
        for address in addresses:
            # A peer that failed once is otherwise blocked for a minute; host.connect would try one address, and sleep.
            network.unblock_peer(peer)
            try:
                with trio.fail_after(DIAL_SECONDS):
                    await network.dial_addr(Multiaddr(address), peer)
            except Exception as error:
                log.debug("dialling %s at %s failed: %s", peer, address, error)
                continue
            self._dials.pop(key, None)
            return
        dial.failed(trio.current_time())
        if dial.failures in (3, 10) or dial.failures % 60 == 0:
            log.warning("%s cannot be reached at %s (%d attempts)", peer, ", ".join(addresses), dial.failures)

    async def _drop_strangers(self, connected: set[bytes]) -> None:
        strangers = [key for key in connected if not self._is_ours(key)]
        for key in strangers[: max(0, len(strangers) - MAX_STRANGERS)]:
            await self._close(key)

    async def _close(self, key: bytes) -> None:
        with trio.move_on_after(2.0):
            await self._network.close_peer(ID.from_base58(node_id(key)))

    async def _connected(self, connection: INetConn) -> None:
        key = _key(connection.muxed_conn.peer_id)
        if key is None:
            return
        if len(self._network.get_connections(connection.muxed_conn.peer_id)) <= 1:
            self._handlers.connection_changed(key, True)
        self._dials.pop(key, None)
        self._changed.set()

    async def _disconnected(self, connection: INetConn) -> None:
        key = _key(connection.muxed_conn.peer_id)
        if key is None or self._network.get_connections(connection.muxed_conn.peer_id):
            return
        if (ping := self._pings.pop(key, None)) is not None:
            ping.scope.cancel()
        self._handlers.connection_changed(key, False)
        self._changed.set()

    async def _keep_pinging(self, key: bytes, ping: _Ping) -> None:
        """Close the connection of a peer that is frozen or unplugged; libp2p notices only one that closes."""
        peer = ID.from_base58(node_id(key))
        with ping.scope:
            while self._network.get_connections(peer):
                await trio.sleep(PING_EVERY * random.uniform(0.9, 1.1))
                try:
                    with trio.fail_after(PING_EVERY):
                        # One stream for all pings: a new one each time costs five times the CPU.
                        if ping.stream is None:
                            ping.stream = await self._host.new_stream(peer, [PING])
                        sent = secrets.token_bytes(32)
                        await ping.stream.write(sent)
                        if await read_exactly(ping.stream, len(sent)) != sent:
                            raise OSError("another answer than what was sent")
                    ping.misses = 0
                except Exception as error:
                    ping.misses += 1
                    log.debug("ping %d of %s failed: %r", ping.misses, peer, error)
                    await _reset(ping.stream)
                    ping.stream = None
                    if ping.misses >= PING_MISSES:
                        log.warning("%s has not answered %d pings; closing its connection", peer, ping.misses)
                        await self._close(key)
                        break
        if self._pings.get(key) is ping:
            del self._pings[key]

    # Records ---------------------------------------------------------------------------------------------------------

    async def _keep_records(self) -> None:
        """Exchange records with each new connection, and with a random one from time to time."""
        met: set[bytes] = set()
        due = 0.0
        while True:
            connected = self.connected()
            met &= connected
            fresh = [key for key in connected - met if self._is_ours(key)]
            now = trio.current_time()
            if not fresh and connected and now >= due:
                fresh = [random.choice(sorted(connected))]
            for key in fresh:
                met.add(key)
                await self._exchange_records(key)
                due = trio.current_time() + (2.0 if self._directory.unknown_members() else 30.0)
            with trio.move_on_after(0.0 if fresh else 1.0):
                await self._changed.wait()

    async def _exchange_records(self, key: bytes) -> None:
        peer = ID.from_base58(node_id(key))
        stream: INetStream | None = None
        try:
            with trio.fail_after(EXCHANGE_SECONDS):
                stream = await self._host.new_stream(peer, [RECORDS])
                await self._send_records(stream, key)
                await self._receive_records(stream, key)
                await stream.close()
        except Exception as error:
            log.debug("exchange of records with %s failed: %r", peer, error)
            await _reset(stream)

    async def _serve_records(self, stream: INetStream) -> None:
        key = _key(stream.muxed_conn.peer_id)
        try:
            self._serving.acquire_on_behalf_of_nowait(stream)
        except trio.WouldBlock:
            await _reset(stream)
            return
        try:
            with trio.fail_after(EXCHANGE_SECONDS):
                if key is None:
                    raise Malformed("a peer without an Ed25519 key")
                await self._receive_records(stream, key)
                await self._send_records(stream, key)
                await stream.close()
        except Exception as error:
            log.debug("serving records failed: %r", error)
            await _reset(stream)
        finally:
            self._serving.release_on_behalf_of(stream)

    async def _send_records(self, stream: INetStream, key: bytes) -> None:
        body = wire.Records(records=self._directory.raw_records(MAX_RECORDS)).SerializeToString()
        frame = _LENGTH.pack(len(body)) + body
        for at in range(0, len(frame), WRITE_BYTES):
            await stream.write(frame[at : at + WRITE_BYTES])
        self._handlers.gossip_bytes(key, len(frame), 0)

    async def _receive_records(self, stream: INetStream, key: bytes) -> None:
        (length,) = _LENGTH.unpack(await read_exactly(stream, _LENGTH.size))
        if length > MAX_RECORDS_BYTES:
            raise Malformed(f"{length} bytes of records; at most {MAX_RECORDS_BYTES} are read")
        body = bytearray()
        while len(body) < length:
            chunk = await stream.read(min(length - len(body), WRITE_BYTES))
            if not chunk:
                raise Malformed("the stream ended within the records")
            body += chunk
        self._handlers.gossip_bytes(key, 0, len(body))
        message = wire.Records()
        try:
            message.ParseFromString(bytes(body))
        except DecodeError as error:
            raise Malformed(f"the records do not parse: {error}") from None
        new = self._handlers.records_received(list(message.records)[:MAX_RECORDS], key)
        if new:
            self._changed.set()
        for raw in new:
            await self.gossip_record(raw)

    # Gossip ----------------------------------------------------------------------------------------------------------

    async def _publish(self, topic: str, raw: bytes) -> None:
        peers = self._pubsub.peer_topics.get(topic, set())
        await self._pubsub.publish(topic, raw)
        for peer in list(peers)[: self._router.degree]:
            if (key := _key(peer)) is not None:
                self._handlers.gossip_bytes(key, len(raw), 0)

    def _validate_announcement(self, forwarder: ID, message: rpc_pb2.Message) -> bool:
        return self._validate(forwarder, message, self._handlers.gossip_announcement)

    def _validate_record(self, forwarder: ID, message: rpc_pb2.Message) -> bool:
        return self._validate(forwarder, message, self._handlers.gossip_record)

    def _validate(self, forwarder: ID, message: rpc_pb2.Message, take: Callable[[bytes, bytes | str], bool]) -> bool:
        key = _key(forwarder)
        if key == self._key.public:
            return True
        if key is not None:
            self._handlers.gossip_bytes(key, 0, len(message.data))
        return take(message.data, str(forwarder) if key is None else key)

    async def _drain(self, topic: str) -> None:
        # The validators have done all the work; an unread subscription would only log that it is full.
        subscription = await self._pubsub.subscribe(topic)
        async for _ in subscription:
            pass


class _Notifee(INotifee):
    """libp2p's callbacks, of which two are of interest."""

    def __init__(self, up: Callable[[INetConn], object], down: Callable[[INetConn], object]) -> None:
        self._up, self._down = up, down

    async def connected(self, network: INetwork, conn: INetConn) -> None:
        await self._up(conn)  # type: ignore[misc]

    async def disconnected(self, network: INetwork, conn: INetConn) -> None:
        await self._down(conn)  # type: ignore[misc]

    async def opened_stream(self, network: INetwork, stream: INetStream) -> None:
        pass

    async def closed_stream(self, network: INetwork, stream: INetStream) -> None:
        pass

    async def listen(self, network: INetwork, multiaddr: Multiaddr) -> None:
        pass

    async def listen_close(self, network: INetwork, multiaddr: Multiaddr) -> None:
        pass


def parse_bootstrap(address: str) -> tuple[bytes, str]:
    """Return (node key, multiaddr without /p2p) of ``/ip4/IP/tcp/PORT/p2p/ID``. Raises Malformed or IdentityError."""
    plain, _, peer = address.rpartition("/p2p/")
    ip, port = split_multiaddr(plain)
    return public_key(peer), join_multiaddr(ip, port)


def _make_host(key: NodeKey) -> IHost:
    pair = create_identity_from_seed(key.seed)
    noise = Noise(pair, noise_privkey=create_noise_key().private_key)
    return new_host(
        key_pair=pair,
        sec_opt={NOISE: noise},
        muxer_opt={TProtocol(YAMUX): Yamux},
        transports=[TCP()],
        negotiate_timeout=10,
        disable_identify_address_discovery=True,
        # No automatic dialling and pruning: _keep_connections does both, and knows who is a member.
        connection_config=ConnectionConfig(
            max_connections=MAX_CONNECTIONS,
            min_connections=0,
            low_watermark=0,
            high_watermark=MAX_CONNECTIONS,
            max_connections_per_peer=2,
        ),
        # Its extras are off: one of them refuses every connection for a minute after five failures, another one when
        # the machine (which is busy training) is short of memory.
        resource_manager=ResourceManager(
            limits=ResourceLimits(max_connections=4 * MAX_CONNECTIONS, max_streams=1 << 20),
            enable_metrics=False,
            enable_connection_tracking=False,
            enable_memory_limits=False,
            enable_circuit_breaker=False,
            enable_graceful_degradation=False,
        ),
    )


def _key(peer: ID) -> bytes | None:
    try:
        return public_key(str(peer))
    except IdentityError:
        return None


async def _reset(stream: INetStream | None) -> None:
    if stream is not None:
        with trio.move_on_after(1.0) as scope, contextlib.suppress(Exception):
            scope.shield = True
            await stream.reset()


def new_seq() -> int:
    """Return a sequence number for a node record: larger than those of earlier lives of this node."""
    return int(time.time() * 1000)
