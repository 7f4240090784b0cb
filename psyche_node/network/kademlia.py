"""Node records in Kademlia: where a member is whose record nobody has told this node.

py-libp2p's DHT keeps what it is given and talks to whom it is told about. Here it is fenced in: members alone store,
ask and are asked; a value is a member's own signed record, under the run and its key; nothing else is kept. Its
protocol is /ipfs/kad/1.0.0, so nodes of other DHTs may call; they are not members.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, cast

import trio
from libp2p.abc import IHost, INetStream
from libp2p.custom_types import TProtocol
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.kad_dht.pb.kademlia_pb2 import Record
from libp2p.kad_dht.provider_store import ProviderStore
from libp2p.kad_dht.value_store import ValueStore
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.records.validator import NamespacedValidator, Validator
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from psyche_node.network.directory import Directory
from psyche_node.network.host import Handlers, dial, key_of, network_of, peer_of, reset
from psyche_node.network.statements import MAX_ADDRESSES, Malformed, NodeRecord, split_multiaddr

log = logging.getLogger(__name__)
LOOK_EVERY = 5.0
# The first time a while after the start, when the network has settled: each costs a stream to twenty members.
PUBLISH_AFTER = (10.0, 20.0)
PUBLISH_EVERY = 600.0
LOOKUP_SECONDS = 20.0
SERVE_SECONDS = 15.0
DIAL_SECONDS = 3.0
ADDRESS_SECONDS = 3600
LONGEST_BACKOFF = 60.0


class Kademlia:
    """Publishes this node's record and finds those of members that are missing."""

    def __init__(self, host: IHost, run: bytes, directory: Directory, handlers: Handlers) -> None:
        self._host, self._directory, self._handlers = host, directory, handlers
        self._run = run
        fence = cast(IHost, _Fence(host, directory))
        self.service = KadDHT(
            fence,
            DHTMode.SERVER,
            validator=NamespacedValidator({_namespace(run): Records(run, directory)}, strict_validation=True),
            validator_changed=True,  # or it adds two kinds of values of its own
            strict_validation=True,
        )
        self.service.value_store = _Values(fence, host.get_id())
        self.service.provider_store = _NoProviders(fence, self.service.peer_routing)
        self._published: bytes | None = None
        self._publish_at = 0.0
        self._asked: dict[bytes, tuple[int, float]] = {}

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self._publish_at = trio.current_time() + random.uniform(*PUBLISH_AFTER)
        async with background_trio_service(self.service):
            yield

    async def keep(self) -> None:
        """Publish and look for records until cancelled."""
        while True:
            await self._meet()
            await self._publish()
            for slot in self._directory.unknown_members():
                if (key := self._directory.key(slot)) is not None:
                    await self._look_for(key)
            await trio.sleep(LOOK_EVERY)

    def name(self, key: bytes) -> str:
        """Return the key under which the record of the node with this key is stored."""
        return _name(self._run, key)

    async def publish(self, raw: bytes) -> None:
        """Store this node's record at the members nearest to its key."""
        with trio.move_on_after(LOOKUP_SECONDS):
            await self.service.put_value(self.name(self._directory.own_key), raw)

    async def look_up(self, key: bytes) -> bytes | None:
        """Return the newest record of a node that the members nearest to its key have."""
        with trio.move_on_after(LOOKUP_SECONDS):
            return await self.service.get_value(self.name(key))
        return None

    async def _meet(self) -> None:
        # Connecting does not fill the routing table by itself.
        book = self._host.get_peerstore()
        for connected in network_of(self._host).get_connections_map():
            key = key_of(connected)
            record = None if key is None else self._directory.record(key)
            if key is None or record is None or self._directory.slot(key) is None:
                continue
            book.add_addrs(connected, [Multiaddr(address) for address in record.p2p_addresses], ADDRESS_SECONDS)
            await self.service.routing_table.add_peer(connected, skip_server_mode_check=True)

    async def _publish(self) -> None:
        mine = self._directory.known(self._directory.own_key)
        now = trio.current_time()
        if mine is None or self._directory.slot(mine.record.node_key) is None:
            return
        changed = self._published is not None and mine.raw != self._published
        if not self.service.get_routing_table_size() or (now < self._publish_at and not changed):
            return
        try:
            await self.publish(mine.raw)
        except Exception as error:
            log.debug("the record could not be put into Kademlia: %r", error)
        self._published = mine.raw
        self._publish_at = now + PUBLISH_EVERY * random.uniform(0.8, 1.2)

    async def _look_for(self, key: bytes) -> None:
        failures, due = self._asked.get(key, (0, 0.0))
        if trio.current_time() < due or not self.service.get_routing_table_size():
            return
        found: bytes | None = None
        try:
            found = await self.look_up(key)
        except Exception as error:
            log.debug("looking for %s in Kademlia failed: %r", peer_of(key), error)
        if found is not None and self._handlers.records_received([found], key):
            log.info("found %s in Kademlia", peer_of(key))
        if len(self._asked) > 4096:
            self._asked.clear()
        wait = min(LONGEST_BACKOFF, LOOK_EVERY * 2.0 ** min(failures, 8)) * random.uniform(0.8, 1.2)
        self._asked[key] = (failures + 1, trio.current_time() + wait)


def _namespace(run: bytes) -> str:
    return f"psyche-{run.hex()[:32]}"


def _name(run: bytes, key: bytes) -> str:
    return f"/{_namespace(run)}/{key.hex()}"


class Records(Validator):
    """What may be stored: a member's record in its own signed words, the newest one."""

    def __init__(self, run: bytes, directory: Directory) -> None:
        self._run, self._directory = run, directory

    def validate(self, key: str, value: bytes) -> None:
        """Raises ValueError."""
        try:
            record = NodeRecord.parse(value, self._run)
        except Malformed as error:
            raise ValueError(f"not a node record of this run: {error}") from None
        # The whole of it: whatever else passed would be kept, up to a mebibyte of name for each record.
        if key != _name(self._run, record.node_key):
            raise ValueError("a record under another key than its node's")
        if self._directory.slot(record.node_key) is None:
            raise ValueError("its node is not a member of the run")

    def select(self, key: str, values: list[bytes]) -> int:
        """Return the index of the newest; the first one of several."""
        return max(range(len(values)), key=lambda index: (self._seq(values[index]), -index))

    def _seq(self, value: bytes) -> int:
        try:
            return NodeRecord.parse(value, self._run).seq
        except Malformed:
            return -1


class _Values(ValueStore):
    """Keeps of a record what has been checked. The rest could be a mebibyte of anything."""

    def put_record(self, key: bytes, record: Record) -> None:
        super().put_record(key, Record(key=key, value=record.value, timeReceived=record.timeReceived))


class _NoProviders(ProviderStore):
    """Nobody provides anything here."""

    def add_provider(self, key: bytes, provider: PeerInfo) -> None:
        pass


class _Fence:
    """The host as the DHT may use it: streams from and to members, addresses of members, deadlines on all."""

    def __init__(self, host: IHost, directory: Directory) -> None:
        self._host, self._directory = host, directory
        self._book = _Book(host.get_peerstore(), self.inside)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    def inside(self, peer: ID) -> bool:
        key = key_of(peer)
        return key is not None and self._directory.slot(key) is not None

    def get_peerstore(self) -> Any:
        return self._book

    def get_connected_peers(self) -> list[ID]:
        return [peer for peer in self._host.get_connected_peers() if self.inside(peer)]

    def set_stream_handler(self, protocol: TProtocol, handler: Callable[[INetStream], Awaitable[None]]) -> None:
        async def serve(stream: INetStream) -> None:
            if not self.inside(stream.muxed_conn.peer_id):
                await reset(stream)
                return
            with trio.move_on_after(SERVE_SECONDS) as scope:
                await handler(stream)
            if scope.cancelled_caught:
                await reset(stream)

        self._host.set_stream_handler(protocol, serve)

    async def new_stream(self, peer: ID, protocols: Sequence[TProtocol]) -> INetStream:
        key = key_of(peer)
        if key is None or not self.inside(peer):
            raise OSError("not a member")
        if not network_of(self._host).get_connections(peer):
            await self._dial(peer, key)
        return await self._host.new_stream(peer, protocols)

    async def _dial(self, peer: ID, key: bytes) -> None:
        record = self._directory.record(key)
        addresses = record.p2p_addresses if record is not None else tuple(map(str, self._book.addrs(peer)))
        for address in addresses[:MAX_ADDRESSES]:
            with contextlib.suppress(Exception):
                await dial(self._host, key, address, DIAL_SECONDS)
                return
        raise OSError("it does not answer")


class _Book:
    """The host's address book, in which the DHT writes about members only, and only addresses of TCP over IP."""

    def __init__(self, book: Any, inside: Callable[[ID], bool]) -> None:
        self._book, self._inside = book, inside

    def __getattr__(self, name: str) -> Any:
        return getattr(self._book, name)

    def peer_ids(self) -> list[ID]:
        return [peer for peer in self._book.peer_ids() if self._inside(peer)]

    def add_addrs(self, peer: ID, addresses: Sequence[Multiaddr], ttl: int = ADDRESS_SECONDS) -> None:
        usable = [address for address in addresses[:MAX_ADDRESSES] if _usable(address)]
        if usable and self._inside(peer):
            self._book.add_addrs(peer, usable, ttl)

    def consume_peer_record(self, envelope: Any, ttl: int) -> bool:
        # A stranger's record is left alone, which the DHT takes for a bad one: it passes that stranger over.
        return self._inside(envelope.record().peer_id) and bool(self._book.consume_peer_record(envelope, ttl))


def _usable(address: Multiaddr) -> bool:
    try:
        split_multiaddr(str(address))
    except Malformed:
        return False
    return True
