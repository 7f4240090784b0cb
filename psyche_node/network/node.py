"""The network process: puts its parts together and does what the supervisor asks. Runs on trio."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import trio

from psyche_node.faults import Faults
from psyche_node.identity import NodeKey, load_or_create_node_key, node_id
from psyche_node.ipc import Message, Ok
from psyche_node.network.acquaintances import Acquaintances
from psyche_node.network.addresses import Addresses, NetworkError, announced_host, parse_run
from psyche_node.network.announcements import Announcements, Outcome, Verdict
from psyche_node.network.bulk.lanes import Lanes
from psyche_node.network.bulk.server import BulkServer
from psyche_node.network.certificates import LIFETIME_SECONDS, Leaf, issue
from psyche_node.network.directory import Directory
from psyche_node.network.fetcher import Fetcher
from psyche_node.network.guard import Guard
from psyche_node.network.holdings import Holdings
from psyche_node.network.lan import look_around
from psyche_node.network.links import Links, probe
from psyche_node.network.messages import (
    Announced,
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
    Why,
)
from psyche_node.network.nat.dialback import DialBack
from psyche_node.network.nat.paths import SERVER_SOCKET, Paths
from psyche_node.network.nat.puncher import Puncher
from psyche_node.network.nat.reachability import Reachability
from psyche_node.network.nat.sockets import SocketFolder
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
    Malformed,
    NodeRecord,
    join_multiaddr,
    parse_bootstrap,
    split_address,
)
from psyche_node.network.store import BlobStore
from psyche_node.network.swarm import Swarm
from psyche_node.network.threads import in_thread
from psyche_node.network.throttle import Throttle

log = logging.getLogger(__name__)
RENEW_EVERY = 3600.0
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
        self._leaf: Leaf = issue(self._key)
        self._directory = Directory(self._key.public)
        self._reporter = Reporter(emit, self._directory.slot)
        self._traffic = Traffic(self._vouches)
        self._sockets = SocketFolder(Path(configure.folder) / "sockets")
        self._paths = Paths(self._sockets)
        self._directory.on_paths(self._paths.has)
        self._throttle = Throttle()
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
        self._links = Links(lambda: self._leaf, self._directory, self._reporter, self._traffic, self._paths)
        self._lanes = Lanes(self._links, lambda: self._leaf, self._directory, self._reporter, self._traffic)
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
            self._take_asked,
        )
        self._faults = Faults.parse(configure.faults)
        self._dialback = DialBack(lambda address, seconds: probe(address, seconds, self._leaf))
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
        self._puncher = Puncher(
            self._paths, self._links, self._directory, lambda: self._leaf, lambda peer: self._fetcher.reachable(peer)
        )
        self._swarm = Swarm(self._key, self._run, self._directory, self, self._bootstrap)
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
            self._take_from_thread,
            self._holdings,
            self._traffic,
            self._faults,
            self._take_offer,
            self._quality.heard,
        )
        server = Server(
            configure.listen_host,
            configure.grpc_port,
            lambda: self._leaf,
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
                lambda: self._leaf,
                guard,
                service.pieces,
                self._reporter,
            )
            async with self._swarm.running(configure.listen_host, configure.p2p_port) as nursery:
                self._nursery = nursery
                self._addresses = Addresses(
                    self._host,
                    self._swarm.port,
                    server.port,
                    configure.announce_p2p,
                    configure.announce_grpc,
                    bulk.port,
                    configure.announce_bulk,
                )
                await self._renew_record()
                nursery.start_soon(self._fetcher.run)
                nursery.start_soon(self._keep_leaf)
                nursery.start_soon(self._acquaintances.keep)
                nursery.start_soon(self._spreader.meet)
                if configure.mdns:
                    address, listen = join_multiaddr(self._host, self._swarm.port), configure.listen_host
                    nursery.start_soon(look_around, self._run, self._key.node_id, address, listen, self._swarm.hint)
                nursery.start_soon(self._paths.run)
                nursery.start_soon(self._puncher.run, self._swarm.host, self._dialback)
                nursery.start_soon(self._pusher.run)
                nursery.start_soon(self._reachability.run, split_address(self._addresses.grpc())[1])
                yield Ready(
                    node_id=self._key.node_id,
                    multiaddrs=[f"{address}/p2p/{self._key.node_id}" for address in self._addresses.p2p()],
                    grpc_address=self._addresses.grpc(),
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
        self._fetcher.sources_changed()
        self._swarm.wake()

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

    def _take_from_thread(self, raw: bytes, sender: bytes) -> None:
        assert self._token is not None
        if not self.allows(sender):
            return
        # The caller waits, so that a peer cannot queue more than it has calls open.
        trio.from_thread.run_sync(self._take_announcement, raw, sender, trio_token=self._token)

    def _pushed_from_thread(self, digest: bytes, sender: bytes) -> None:
        assert self._token is not None
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._fetcher.arrived, digest, sender)

    def _take_asked(self, raw: bytes, sender: bytes) -> None:
        if self.allows(sender):
            self._take_announcement(raw, sender)

    def allows(self, peer: bytes | str) -> bool:
        allowed = self._throttle.allows(peer)
        if not allowed:
            reason = "it sends more statements than are looked at; the rest is dropped"
            self._reporter.rejected("flood", peer, reason, Why.TOO_MANY)
        return allowed

    def _take_offer(self, digest: bytes, holder: bytes) -> None:
        assert self._token is not None
        trio.from_thread.run_sync(self._fetcher.invited, digest, holder, trio_token=self._token)

    def _take_announcement(self, raw: bytes, sender: bytes | str) -> Outcome:
        outcome = self._announcements.offer(raw)
        said = outcome.announcement
        if outcome.verdict is Verdict.REFUSED:
            blamed = sender if said is None else said.node_key
            # An honest forwarder has not seen the other one of two. A stranger's key is free: its bucket is no price.
            self._throttle.refused(sender if outcome.slot is None else blamed)
            where = "" if said is None else f" (round {said.round}, digest {said.digest.hex()[:16]})"
            self._reporter.rejected("announcement", blamed, f"{outcome.reason}{where}", outcome.why)
        elif outcome.verdict is Verdict.NEW and said is not None and outcome.slot is not None:
            self._reporter.emit(
                Announced(round=said.round, member=outcome.slot, digest=said.digest.hex(), length=said.length)
            )
            self._fetcher.announced(said.digest, said.node_key)
        return outcome

    def gossip_announcement(self, raw: bytes, forwarder: bytes | str) -> bool:
        return self._take_announcement(raw, forwarder).verdict in (Verdict.NEW, Verdict.KNOWN)

    def gossip_record(self, raw: bytes, forwarder: bytes | str) -> bool:
        return self._take_record(raw, forwarder)

    def records_received(self, raw: list[bytes], sender: bytes) -> list[bytes]:
        fresh = [one for one in raw if not self._directory.holds(one)]
        return [one for one in fresh if self.allows(sender) and self._take_record(one, sender)]

    def _take_record(self, raw: bytes, sender: bytes | str) -> bool:
        if self._directory.holds(raw):
            return False
        try:
            record = NodeRecord.parse(raw, self._run)
        except Malformed as error:
            self._throttle.refused(sender)
            self._reporter.rejected("record", sender, str(error), Why.MALFORMED)
            return False
        # A stranger introduces itself and nobody else, or it could fill the directory with made-up nodes.
        if sender != record.node_key and not self._vouches(sender) and not self._vouches(record.node_key):
            return False
        if record.node_key == self._key.public or not self._directory.add(record, raw):
            return False
        log.debug("%s is at %s, %s", record.node_id, record.grpc_address, ", ".join(record.p2p_addresses))
        self._fetcher.sources_changed()
        self._swarm.wake()
        return True

    def _vouches(self, peer: bytes | str) -> bool:
        return isinstance(peer, bytes) and (
            self._directory.slot(peer) is not None or any(peer == key for key, _ in self._bootstrap)
        )

    def connection_changed(self, peer: bytes, up: bool) -> None:
        log.debug("%s %s", node_id(peer), "connected" if up else "disconnected")
        self._report_connections()

    def gossip_bytes(self, peer: bytes, sent: int, received: int) -> None:
        self._traffic.sent(peer, sent)
        self._traffic.received(peer, received)

    def refused(self, what: str, peer: bytes | str, reason: str, why: Why) -> None:
        self._reporter.rejected(what, peer, reason, why)

    def probed(self) -> None:
        """Somebody looked whether this node is there, or at its certificate, and showed none. Any thread."""
        self._reporter.count("probe", Why.OTHER)

    def handshake_refused(self, reason: str, why: Why) -> None:
        """A TLS handshake with the gRPC server failed; who it was, gRPC does not tell. Any thread."""
        self._reporter.rejected("handshake", "at the gRPC port", reason, why)

    def _report_connections(self) -> None:
        connected = self._swarm.connected()
        up = {slot for slot, key in self._directory.others().items() if key in connected}
        for slot in sorted(up - self._up):
            self._reporter.emit(PeerUp(slot=slot))
        for slot in sorted(self._up - up):
            self._reporter.emit(PeerDown(slot=slot))
        self._up = up

    # This node's own record ------------------------------------------------------------------------------------------

    async def _keep_leaf(self) -> None:
        while True:
            await trio.sleep(RENEW_EVERY)
            if self._leaf.expires - time.time() < LIFETIME_SECONDS / 2:
                self._leaf = issue(self._key)
                await self._renew_record()

    async def _standing_changed(self) -> None:
        await self._renew_record()
        self._pusher.wake()
        self._fetcher.sources_changed()
        self._swarm.wake()

    async def _renew_record(self) -> None:
        standing = self._reachability.standing
        # A public node behind a NAT that forwards its ports is reached where others see it.
        outside = "" if standing.private else standing.ip
        record = NodeRecord(
            self._run,
            self._key.public,
            int(time.time() * 1000),  # larger than those of earlier lives of this node
            self._addresses.p2p(outside),
            self._addresses.grpc(outside),
            self._leaf.der_hash,
            self._leaf.expires,
            self._reachability.private,
            standing.ip if standing.private else "",
            "" if self._reachability.private else self._addresses.bulk(outside),
        )
        known = self._directory.record(self._key.public)
        if known is not None and replace(known, seq=record.seq) == record:
            return
        raw = record.sign(self._key)
        self._directory.add(record, raw)
        await self._swarm.gossip.record(raw)
