"""The network process: puts its parts together and does what the supervisor asks. Runs on trio."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import trio

from psyche_node.faults import Faults
from psyche_node.identity import NodeKey, load_or_create_node_key, node_id
from psyche_node.ipc import Message, Ok
from psyche_node.network.acquaintances import Acquaintances
from psyche_node.network.addresses import Addresses, NetworkError, announced_host, parse_run
from psyche_node.network.announcements import Announcements
from psyche_node.network.bulk.lanes import Lanes
from psyche_node.network.bulk.server import BulkServer
from psyche_node.network.directory import Directory
from psyche_node.network.fetcher import Fetcher
from psyche_node.network.guard import Guard
from psyche_node.network.holdings import Holdings
from psyche_node.network.intake import Intake
from psyche_node.network.lan import look_around
from psyche_node.network.links import Links, probe
from psyche_node.network.messages import (
    Configure,
    Forget,
    GetStats,
    Kind,
    NetworkShutdown,
    PeerDown,
    PeerStats,
    PeerUp,
    Publish,
    Ready,
    SetMembers,
    Stats,
    Want,
)
from psyche_node.network.nat.dialback import DialBack
from psyche_node.network.nat.paths import SERVER_SOCKET, Paths
from psyche_node.network.nat.puncher import Puncher
from psyche_node.network.nat.reachability import Reachability
from psyche_node.network.nat.sockets import SocketFolder
from psyche_node.network.own_record import OwnRecord
from psyche_node.network.ports import check_ports
from psyche_node.network.push import PushReceiver
from psyche_node.network.pusher import Pusher
from psyche_node.network.quality import Quality
from psyche_node.network.reader import Reader
from psyche_node.network.reports import Reporter, Traffic
from psyche_node.network.server import Server
from psyche_node.network.service import NodeService
from psyche_node.network.spread import Spreader
from psyche_node.network.statements import (
    Announcement,
    join_multiaddr,
    parse_bootstrap,
    split_address,
)
from psyche_node.network.store import BlobStore
from psyche_node.network.swarm import Swarm
from psyche_node.network.threads import in_thread

log = logging.getLogger(__name__)
PORTS = ("p2p_port", "grpc_port", "bulk_port")


class NetworkNode:
    """One node's network. ``handle`` answers the supervisor's requests; everything it finds out goes to ``emit``."""

    def __init__(self, configure: Configure, emit: Callable[[Message], None]) -> None:
        """Read the node key and open the store. Raises IdentityError, Malformed, NetworkError or ValueError."""
        self._key: NodeKey = load_or_create_node_key(Path(configure.node_key_path))
        self._run = parse_run(configure.run)
        self._bootstrap = [parse_bootstrap(address) for address in configure.bootstrap]
        self._configure = configure
        self._host = announced_host(configure.listen_host, self._bootstrap)
        for forwarded in filter(None, (configure.announce_grpc, configure.announce_p2p, configure.announce_bulk)):
            split_address(forwarded)
        self._directory = Directory(self._key.public)
        self._own = OwnRecord(self._key, self._run, self._directory)
        self._reporter = Reporter(emit, self._directory.slot)
        self._traffic = Traffic(self._vouches)
        self._sockets = SocketFolder(Path(configure.folder) / "sockets")
        self._paths = Paths(self._sockets)
        self._directory.on_paths(self._paths.has)
        path = Path(configure.folder) / "peers"
        self._acquaintances = Acquaintances(path, self._run, self._directory, self._bootstrap)
        self._bootstrap = self._acquaintances.bootstrap
        self._store = BlobStore(Path(configure.folder) / "blobs")
        if swept := self._store.sweep():
            log.info("removed %d unfinished downloads of an earlier process", swept)
        self._reader = Reader(self._store)
        self._holdings = Holdings(self._reader)
        self._quality = Quality()
        self._announcements = Announcements(self._run, self._directory)
        self.intake = Intake(
            self._run,
            self._directory,
            self._announcements,
            self._reporter,
            self._traffic,
            vouches=self._vouches,
            announced=self._announced,
            sources_changed=self._sources_changed,
            connections_changed=self._report_connections,
        )
        self._links = Links(self._own.leaf, self._directory, self._reporter, self._traffic, self._paths)
        self._lanes = Lanes(self._links, self._own.leaf, self._directory, self._reporter, self._traffic)
        self._fetcher = Fetcher(
            self._store,
            self._reader,
            self._holdings,
            self._links,
            self._lanes,
            self._directory,
            self._announcements,
            self._quality,
            self._reporter,
            self.intake.asked_announcement,
        )
        self._faults = Faults.parse(configure.faults)
        self._dialback = DialBack(lambda address, seconds: probe(address, seconds, self._own.leaf()))
        self._receiver = PushReceiver(
            self._store,
            self._reader,
            self._directory,
            self._announcements,
            self._fetcher,
            self._reporter,
            self._traffic,
            self._pushed_from_thread,
        )
        # Who says at which address it is reached knows that it is.
        reachable = "yes" if configure.announce_grpc and configure.reachable == "auto" else configure.reachable
        self._reachability = Reachability(
            reachable,
            self._host,
            self._links,
            self._directory,
            self._standing_changed,
        )
        self._pusher = Pusher(self._links, self._fetcher.spread_to, self._reader, lambda: self._reachability.private)
        self._puncher = Puncher(self._paths, self._links, self._directory, self._own.leaf, self._fetcher.reachable)
        self._swarm = Swarm(self._key, self._run, self._directory, self.intake, self._bootstrap)
        self._spreader = Spreader(self._directory, self._links, self._swarm)
        self._up: set[int] = set()
        self._token: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery | None = None
        self.stopping = trio.Event()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Ready]:
        """Bring everything up; yields what to tell the supervisor. Raises NetworkError when a port cannot be had."""
        configure = self._configure
        check_ports(configure.listen_host, {name: getattr(configure, name) for name in PORTS})
        self._token = trio.lowlevel.current_trio_token()
        guard = Guard(self._directory, self._reporter)
        service = NodeService(
            self._announcements,
            self._announced_from_thread,
            self._holdings,
            self._traffic,
            self._faults,
            self._offered_from_thread,
            self._quality.heard,
        )
        server = Server(
            configure.listen_host,
            configure.grpc_port,
            self._own.leaf,
            guard,
            service,
            more=[self._dialback.handlers(), self._receiver.handlers()],
            unix_path=self._sockets.path(SERVER_SOCKET),
        )
        bulk: BulkServer | None = None
        try:
            bulk = BulkServer(
                configure.listen_host,
                configure.bulk_port,
                self._own.leaf,
                guard,
                service.pieces,
                self._reporter,
            )
            async with self._swarm.running(configure.listen_host, configure.p2p_port) as nursery:
                self._nursery = nursery
                addresses = Addresses(
                    self._host,
                    self._swarm.port,
                    server.port,
                    configure.announce_p2p,
                    configure.announce_grpc,
                    bulk.port,
                    configure.announce_bulk,
                )
                await self._begin(nursery, addresses)
                yield Ready(
                    node_id=self._key.node_id,
                    multiaddrs=[f"{address}/p2p/{self._key.node_id}" for address in addresses.p2p()],
                    grpc_address=addresses.grpc(),
                    p2p_port=self._swarm.port,
                    grpc_port=server.port,
                    bulk_port=bulk.port,
                )
                self._nursery = None
        finally:
            self._lanes.close()
            self._links.close()
            if bulk is not None:
                bulk.stop()
            server.stop()
            self._sockets.close()

    async def _begin(self, nursery: trio.Nursery, addresses: Addresses) -> None:
        """Say where this node is, and start what goes on until it is stopped."""
        await self._own.begin(addresses, self._reachability, self._swarm.gossip.record)
        nursery.start_soon(self._fetcher.run)
        nursery.start_soon(self._own.keep)
        nursery.start_soon(self._acquaintances.keep)
        nursery.start_soon(self._spreader.meet)
        if self._configure.mdns:
            address, listen = join_multiaddr(self._host, self._swarm.port), self._configure.listen_host
            nursery.start_soon(look_around, self._run, self._key.node_id, address, listen, self._swarm.hint)
        nursery.start_soon(self._paths.run)
        nursery.start_soon(self._puncher.run, self._swarm.host, self._dialback)
        nursery.start_soon(self._pusher.run)
        nursery.start_soon(self._reachability.run, split_address(addresses.grpc())[1])

    async def handle(self, message: Message) -> Message:
        """Do what the supervisor asks and return the reply. Raises NetworkError, which reaches it as a Failure."""
        match message:
            case SetMembers():
                self._set_members(message)
            case Publish():
                await self._publish(message)
            case Want():
                if message.kind is Kind.UPDATE:
                    self._announcements.reached(message.round)
                self._receiver.asked([bytes.fromhex(want.digest) for want in message.wants])
                for want in message.wants:
                    self._fetcher.want(
                        message.round, want.member, bytes.fromhex(want.digest), want.length, message.kind
                    )
            case Forget():
                self._fetcher.forget(message.before_round)
                self._announcements.forget(message.before_round)
                self._receiver.forget(message.before_round)
                self._pusher.forget(message.before_round)
                await in_thread(partial(self._store.forget, message.before_round))
            case GetStats():
                return self._stats()
            case NetworkShutdown():
                self.stopping.set()
            case _:
                raise NetworkError(f"the network process has no use for {type(message).__name__}")
        return Ok()

    # Requests --------------------------------------------------------------------------------------------------------

    def _set_members(self, message: SetMembers) -> None:
        members = {entry.slot: bytes.fromhex(entry.node_key) for entry in message.members}
        if len(members) != len(message.members) or len(set(members.values())) != len(members):
            raise NetworkError("two entries of the member list share a slot or a node key")
        wallets = {bytes.fromhex(entry.node_key): entry.wallet for entry in message.members if entry.wallet}
        self._directory.set_members(members, wallets)
        self._links.retain(set(members.values()))
        self._lanes.retain(set(members.values()))
        self._paths.retain(set(members.values()))
        self._traffic.retain()
        self._report_connections()
        self._sources_changed()

    async def _publish(self, message: Publish) -> None:
        digest = bytes.fromhex(message.digest)
        manifest = await in_thread(partial(self._reader.manifest, digest))
        if manifest is None or manifest.length != message.length:
            found = "is not there" if manifest is None else f"has {manifest.length} bytes"
            raise NetworkError(f"blob {message.digest[:16]} of {message.length} bytes {found} in {self._store.folder}")
        self._fetcher.published(digest, message.kind, message.round)
        if message.kind is not Kind.UPDATE:
            # Who wants it asks for it; an announcement speaks of a member's one update of a round.
            return
        self._announcements.reached(message.round)
        announcement = Announcement(self._run, message.round, self._key.public, digest, message.length)
        raw = announcement.sign(self._key)
        self._announcements.offer(raw)
        self._pusher.published(message.round, digest, message.length, raw)
        if self._nursery is not None:
            self._nursery.start_soon(self._spreader.spread, raw)

    def _stats(self) -> Stats:
        per_peer = self._traffic.per_peer()
        sent_in_all, received_in_all = self._traffic.totals()
        connected = self._swarm.connected()
        punched = self._paths.punched()
        return Stats(
            bytes_sent=sent_in_all,
            bytes_received=received_in_all,
            blob_bytes_sent=self._traffic.blob_sent,
            blob_bytes_received=self._traffic.blob_received,
            bulk_bytes_sent=self._traffic.bulk_sent,
            bulk_bytes_received=self._traffic.bulk_received,
            peers=len(connected),
            private=self._reachability.standing.private,
            connected=sorted(self._up),
            per_peer=[
                PeerStats(
                    node_id=node_id(key),
                    slot=self._directory.slot(key),
                    connected=key in connected,
                    bytes_sent=sent,
                    bytes_received=received,
                    banned=self._directory.banned(key),
                    punched=key in punched,
                )
                for key, (sent, received) in sorted(per_peer.items())
            ],
            refusals=self._reporter.refusals(),
        )

    # What comes in ---------------------------------------------------------------------------------------------------

    def _vouches(self, peer: bytes | str) -> bool:
        return isinstance(peer, bytes) and (
            self._directory.slot(peer) is not None or any(peer == key for key, _ in self._bootstrap)
        )

    def _announced(self, said: Announcement) -> None:
        self._fetcher.announced(said.digest, said.node_key)

    def _sources_changed(self) -> None:
        self._fetcher.sources_changed()
        self._swarm.wake()

    async def _standing_changed(self) -> None:
        await self._own.renew()
        self._pusher.wake()
        self._sources_changed()

    def _report_connections(self) -> None:
        connected = self._swarm.connected()
        up = {slot for slot, key in self._directory.others().items() if key in connected}
        for slot in sorted(up - self._up):
            self._reporter.emit(PeerUp(slot=slot))
        for slot in sorted(self._up - up):
            self._reporter.emit(PeerDown(slot=slot))
        self._up = up

    # From the threads of gRPC ----------------------------------------------------------------------------------------

    def _announced_from_thread(self, raw: bytes, sender: bytes) -> None:
        assert self._token is not None
        if not self.intake.allows(sender):
            return
        # The caller waits, so that a peer cannot queue more than it has calls open.
        trio.from_thread.run_sync(self.intake.announcement, raw, sender, trio_token=self._token)

    def _offered_from_thread(self, digest: bytes, holder: bytes) -> None:
        assert self._token is not None
        trio.from_thread.run_sync(self._fetcher.invited, digest, holder, trio_token=self._token)

    def _pushed_from_thread(self, digest: bytes, sender: bytes) -> None:
        assert self._token is not None
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._fetcher.arrived, digest, sender)
