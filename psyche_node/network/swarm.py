"""Connections to the other members over libp2p: made, kept, watched. Runs on trio."""

from __future__ import annotations

import contextlib
import logging
import math
import random
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import trio
from libp2p.abc import INetConn, INetStream
from libp2p.host.ping import ID as PING
from libp2p.io.utils import read_exactly
from libp2p.peer.id import ID

from psyche_node.identity import NodeKey
from psyche_node.network import health
from psyche_node.network.direct import DirectAnnouncements
from psyche_node.network.directory import Directory
from psyche_node.network.gate import Gate
from psyche_node.network.gossip import Gossip
from psyche_node.network.host import Handlers, Notifee, dial, key_of, listening, make_host, network_of, peer_of, reset
from psyche_node.network.kademlia import Kademlia
from psyche_node.network.messages import Why
from psyche_node.network.records import RecordExchange
from psyche_node.network.unreached import why_unreached

log = logging.getLogger(__name__)
# Connections of nodes that are not members (yet): they may ask for records, and not crowd out the members.
MAX_STRANGERS = 32
# A node keeps connections to this many members; gossip reaches the others.
WANTED_CONNECTIONS = 32
# For one address the first time, two and three times as long afterwards. A handshake is 60 ms of Python on both sides:
# on a busy machine many at once, or impatient ones, would all fail, again and again.
DIAL_SECONDS = 5.0
DIALS_AT_ONCE = 4
LONGEST_BACKOFF = 30.0
# Of two nodes one dials, and the other only when that has not happened within this time.
YIELD_SECONDS = 3.0
PING_EVERY = 5.0
PING_SECONDS = 5.0
PING_MISSES = 3
RECORDS_EVERY = 30.0
RECORDS_EVERY_WHEN_INCOMPLETE = 2.0
MAX_HINTS = 256
_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(slots=True)
class _Dial:
    """When to try a peer again: after 1, 2, 4 .. 30 seconds, with jitter."""

    failures: int = 0
    due: float = 0.0
    running: bool = False

    def failed(self) -> None:
        self.failures += 1
        wait = min(LONGEST_BACKOFF, 2.0 ** min(self.failures - 1, 8))
        self.due = trio.current_time() + wait * random.uniform(0.8, 1.2)


@dataclass(slots=True)
class _Ping:
    misses: int = 0
    stream: INetStream | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class Swarm:
    """One libp2p host with gossip and records. Create it, then enter ``running``."""

    def __init__(
        self, key: NodeKey, run: bytes, directory: Directory, handlers: Handlers, bootstrap: list[tuple[bytes, str]]
    ) -> None:
        """``bootstrap``: (node key, multiaddr without /p2p) of nodes to start from."""
        self._own_key, self._directory, self._handlers, self._bootstrap = key.public, directory, handlers, bootstrap
        self.host = self._host = make_host(key, Gate(self._is_member, handlers.refused, handlers.probed))
        self._network = network_of(self._host)
        self._network.register_notifee(Notifee(self._connected, self._disconnected))
        self.gossip = Gossip(self._host, run, key.public, handlers, self._is_member)
        self.direct = DirectAnnouncements(self._host, directory, handlers)
        self._records = RecordExchange(self._host, directory, handlers, self.gossip.record)
        self.kademlia = Kademlia(self._host, run, directory, handlers)
        self._hints: dict[bytes, str] = {}
        self._unwelcome: set[ID] = set()
        self._dials: dict[bytes, _Dial] = {}
        # Apart, so that those who are gone do not keep those waiting who are there.
        self._dialling, self._dialling_again = (trio.CapacityLimiter(DIALS_AT_ONCE) for _ in range(2))
        self._pings: dict[bytes, _Ping] = {}
        self._changed = trio.Event()
        self.port = 0

    @contextlib.asynccontextmanager
    async def running(self, ip: str, port: int) -> AsyncIterator[trio.Nursery]:
        """Listen on ``ip``:``port`` (0: any port, see ``port``) and keep connections. Raises OSError when it cannot."""
        async with (
            listening(self._host, ip, port) as self.port,
            self.gossip.running(),
            self.kademlia.running(),
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(self._keep_connections, nursery)
            nursery.start_soon(self._keep_records)
            nursery.start_soon(self.kademlia.keep)
            services = {"network": self._network, "Kademlia": self.kademlia.service, **self.gossip.services}
            nursery.start_soon(health.watch, services, _ANYWHERE.get(ip, ip), self.port)
            yield nursery
            nursery.cancel_scope.cancel()

    def connected(self) -> set[bytes]:
        """Return the keys of all peers with a connection."""
        return set(self._connected_keys())

    def _connected_keys(self) -> list[bytes]:
        """The same, in the order in which they came."""
        return [key for peer in self._network.get_connections_map() if (key := key_of(peer)) is not None]

    def wake(self) -> None:
        """Look at members and records again at once."""
        self._changed.set()

    def hint(self, key: bytes, address: str) -> None:
        """Somebody says that the node with this key is at ``address``: worth a try if it is a member."""
        self._hints.pop(key, None)
        self._hints[key] = address
        if len(self._hints) > MAX_HINTS:
            del self._hints[next(iter(self._hints))]
        self.wake()

    async def _keep_connections(self, nursery: trio.Nursery) -> None:
        while True:
            self._changed = trio.Event()
            now = trio.current_time()
            connected = self.connected()
            for key, addresses in self._targets(connected).items():
                attempt = self._dials.setdefault(key, _Dial())
                if attempt.due <= now and not attempt.running:
                    attempt.running = True
                    nursery.start_soon(self._dial, key, addresses, attempt)
            for key in connected - self._pings.keys():
                if self._is_ours(key):
                    self._pings[key] = ping = _Ping()
                    nursery.start_soon(self._keep_pinging, key, ping)
            # The oldest go: an exchange of records takes a moment, and who comes next wants one, too.
            strangers = [key for key in self._connected_keys() if not self._is_ours(key)]
            for key in strangers[: max(0, len(strangers) - MAX_STRANGERS)]:
                reason = f"more than {MAX_STRANGERS} peers are connected that are not members"
                self._handlers.refused("connection", key, reason, Why.TOO_MANY)
                self._unwelcome.add(peer_of(key))
            for peer in self._unwelcome:
                nursery.start_soon(self._close, peer)
            self._unwelcome.clear()
            with trio.move_on_after(1.0):
                await self._changed.wait()

    def _is_ours(self, key: bytes) -> bool:
        return self._directory.slot(key) is not None or any(key == known for known, _ in self._bootstrap)

    def _is_member(self, peer: ID) -> bool:
        # Not a bootstrap node's key, nor one of an earlier life: it may be the one that a member has replaced.
        key = key_of(peer)
        return key is not None and self._directory.slot(key) is not None

    def _targets(self, connected: set[bytes]) -> dict[bytes, list[str]]:
        """Return whom to dial, and where."""
        others = self._directory.others().values()
        # Nearest first by XOR: each node another order, so that no member is everybody's choice.
        wanted = sorted(others, key=lambda key: int.from_bytes(key) ^ int.from_bytes(self._own_key))
        targets: dict[bytes, list[str]] = {}
        for key in wanted[:WANTED_CONNECTIONS]:
            record, hint = self._directory.record(key), self._hints.get(key)
            addresses = [] if record is None or self._directory.hidden(record) else list(record.p2p_addresses)
            if hint is not None and hint not in addresses:
                addresses.append(hint)
            if key in connected or not addresses:
                continue
            if self._own_key > key and not self._directory.own_private() and key not in self._dials:
                self._dials[key] = _Dial(due=trio.current_time() + YIELD_SECONDS)
            targets[key] = addresses
        # The bootstrap nodes are for those who know too few others.
        if len(connected) < 2 or self._directory.unknown_members():
            for key, address in self._bootstrap:
                if key not in connected and key != self._own_key and address not in targets.setdefault(key, []):
                    targets[key].append(address)
        return targets

    async def _dial(self, key: bytes, addresses: list[str], attempt: _Dial) -> None:
        async with self._dialling if attempt.failures < 2 else self._dialling_again:
            unreached = await self._dial_one_of(key, addresses, DIAL_SECONDS * min(3, 1 + attempt.failures))
        attempt.running = False
        if not unreached:
            self._dials.pop(key, None)
            return
        attempt.failed()
        if attempt.failures in (3, 10) or attempt.failures % 60 == 0:
            named = "bootstrap node " if any(key == known for known, _ in self._bootstrap) else ""
            where = ", ".join(f"{address} ({why})" for address, why in unreached.items())
            log.warning("%s%s is not reached at %s; %d attempts", named, peer_of(key), where, attempt.failures)

    async def _dial_one_of(self, key: bytes, addresses: list[str], seconds: float) -> dict[str, str]:
        """Return why each address did not do; nothing when there is a connection."""
        unreached: dict[str, str] = {}
        for address in addresses:
            if key in self.connected():
                return {}
            try:
                await dial(self._host, key, address, seconds)
            except Exception as error:
                unreached[address] = why_unreached(error)
                log.debug("dialling %s at %s failed: %r", peer_of(key), address, error)
            else:
                return {}
        return unreached

    async def _close(self, peer: ID) -> None:
        with trio.move_on_after(2.0):
            await self._network.close_peer(peer)

    async def _connected(self, connection: INetConn) -> None:
        peer = connection.muxed_conn.peer_id
        if (key := key_of(peer)) is None:
            reason = "it has no Ed25519 key, which every node of this network has"
            self._handlers.refused("connection", str(peer), reason, Why.IDENTITY)
            self._unwelcome.add(peer)
            self._changed.set()
            return
        self._dials.pop(key, None)
        if len(self.connected()) == 1:
            # The network is back, or this node is: nobody has to be waited for any longer.
            for attempt in self._dials.values():
                attempt.due = 0.0
        self._changed.set()
        self._handlers.connection_changed(key, True)

    async def _disconnected(self, connection: INetConn) -> None:
        peer = connection.muxed_conn.peer_id
        if (key := key_of(peer)) is None or self._network.get_connections(peer):
            return
        if (ping := self._pings.pop(key, None)) is not None:
            ping.scope.cancel()
        self._changed.set()
        self._handlers.connection_changed(key, False)

    async def _keep_pinging(self, key: bytes, ping: _Ping) -> None:
        """Close the connection of a peer that is frozen or unplugged; libp2p notices only one that closes."""
        peer = peer_of(key)
        with ping.scope:
            while self._network.get_connections(peer) and ping.misses < PING_MISSES:
                if not ping.misses:
                    await trio.sleep(PING_EVERY * random.uniform(0.9, 1.1))
                try:
                    with trio.fail_after(PING_SECONDS):
                        # One stream for all pings: a new one each time costs five times the CPU.
                        if ping.stream is None:
                            ping.stream = await self._host.new_stream(peer, [PING])
                        sent = secrets.token_bytes(32)
                        await ping.stream.write(sent)
                        if await read_exactly(ping.stream, len(sent)) != sent:
                            raise OSError("it answered something else")
                    ping.misses = 0
                except Exception as error:
                    ping.misses += 1
                    log.debug("ping %d of %s failed: %r", ping.misses, peer, error)
                    await reset(ping.stream)
                    ping.stream = None
                    await trio.sleep(PING_EVERY / 10)
            if ping.misses >= PING_MISSES:
                log.warning("%s has not answered %d pings; closing its connection", peer, ping.misses)
                await self._close(peer)
        if self._pings.get(key) is ping:
            del self._pings[key]

    async def _keep_records(self) -> None:
        """Exchange records with each new connection, and with a random one from time to time."""
        met: set[bytes] = set()
        asked = -math.inf
        while True:
            connected = self.connected()
            met &= connected
            fresh = [key for key in connected - met if self._is_ours(key)]
            # By what is unknown now: before this node knew its members, there was nothing to look for.
            every = RECORDS_EVERY_WHEN_INCOMPLETE if self._directory.unknown_members() else RECORDS_EVERY
            if not fresh and connected and trio.current_time() - asked >= every:
                fresh = [random.choice(sorted(connected))]
            for key in fresh:
                met.add(key)
                await self._records.ask(key)
                asked = trio.current_time()
            with trio.move_on_after(1.0):
                await self._changed.wait()
