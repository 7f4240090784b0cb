"""Everything that reads the wire, as targets for ``fuzzing``: each takes an input and says whether it was accepted."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fuzzing_bulk
import trio
from blake3 import blake3
from fuzzing_ends import Aborted, Context, Peer, Stream
from fuzzing_inputs import DIGEST, KEYS, RUN, Input, address, announcement, changed, mutated, record, varint
from libp2p.io.exceptions import IncompleteReadError
from libp2p.pubsub.pb import rpc_pb2

from psyche_node.faults import Faults
from psyche_node.ipc import IpcError, Message, decode_frame
from psyche_node.network import direct, peerstore, push
from psyche_node.network.announcements import Verdict
from psyche_node.network.blobs import blob_digest, piece_count, piece_digest
from psyche_node.network.certificates import BadCertificate, identify, issue
from psyche_node.network.direct import DirectAnnouncements
from psyche_node.network.download import BadBytes, Download, NothingYet, Tools
from psyche_node.network.fanout import Tree
from psyche_node.network.host import peer_of
from psyche_node.network.kademlia import Records as KademliaRecords
from psyche_node.network.links import CallFailed, Links
from psyche_node.network.messages import Configure, Fetched, Kind, Publish, Rejected, SetMembers, Want
from psyche_node.network.nat import rendezvous
from psyche_node.network.nat.dialback import DialBack
from psyche_node.network.node import NetworkNode
from psyche_node.network.peerstore import Peerstore
from psyche_node.network.pieces import pack, unpack
from psyche_node.network.records import RecordExchange
from psyche_node.network.reports import Traffic
from psyche_node.network.service import MAX_MESSAGE_BYTES, MAX_REQUEST_BYTES, NodeService
from psyche_node.network.statements import (
    Announcement,
    Malformed,
    NodeRecord,
    join_address,
    join_multiaddr,
    split_address,
    split_multiaddr,
)
from psyche_node.network.store import BlobStore
from psyche_node.network.wants import Choice, Role
from psyche_node.network.wants import Want as OpenWant
from psyche_node.network.wire import node_pb2 as wire

NAMES = ["statements", "taken", "records", "announced", "stored", "bitmaps", "addresses", "requests", "replies"]
NAMES += ["pushes", "punches", "gossip"]
NAMES += ["certificates", "frames", "bulk"]


async def never(caller: bytes, where: str, helper: bytes) -> wire.Punch:
    """An invitation that nobody accepts."""
    raise rendezvous.Refused


def ignored(message: Message) -> None:
    """Where events go."""


class Targets:
    """Everything that is fuzzed. Each method takes an input, raises nothing, and says whether it was accepted."""

    def __init__(self, folder: Path) -> None:
        key_path = folder / "node.key"
        key_path.write_bytes(KEYS[3].seed)
        key_path.chmod(0o600)
        configure = Configure(folder=str(folder / "node"), node_key_path=str(key_path), run=RUN.hex())
        self.node = NetworkNode(configure, ignored)
        self.directory = self.node._directory
        self.directory.set_members({number: key.public for number, key in enumerate(KEYS[:2])})
        self.exchange: RecordExchange = self.node._swarm._records
        self.store: BlobStore = self.node._store
        self.blobs = [self.store.put(bytes([number]) * size, 1) for number, size in enumerate((1, 5000, (2 << 20) + 7))]
        self.service = NodeService(
            self.node._announcements,
            self.node.intake.announcement,
            self.node._holdings,
            Traffic(),
            Faults(),
            self.node._fetcher.invited,
            self.node._quality.heard,
        )
        self.peer = Peer()
        self.leaf = issue(KEYS[0])
        self.links: Links = self.node._links
        self.links._link = lambda peer, ask=False: SimpleNamespace(channel=self.peer)  # type: ignore[assignment,method-assign]
        node = self.node
        begun = lambda want: None  # noqa: E731
        self.tools = Tools(
            node._store, node._reader, node._holdings, node._links, node._lanes, node._quality, begun, lambda: False
        )
        self.direct: DirectAnnouncements = node._swarm.direct
        self.values = KademliaRecords(RUN, self.directory)
        # A timer is a thread, which costs more than the rest of a push; the times themselves are tested elsewhere.
        push._Incoming._limit = lambda incoming, seconds: SimpleNamespace(cancel=lambda: None)
        self.dialback = DialBack(lambda address, seconds: identify(self.leaf.certificate))
        self.rendezvous = rendezvous.Rendezvous(node._swarm._host, self.directory, self.dialback, never)
        gossip = node._swarm.gossip
        self.pubsub: Any = gossip._pubsub
        self.topics = [gossip._announcements, gossip._records]
        for topic in self.topics:
            self.pubsub.subscribed_topics_receive[topic] = None
            self.pubsub.subscribed_topics_send[topic], _ = trio.open_memory_channel[Any](1)
        self.peers = Peerstore(folder / "peers", RUN)

        self.der = base64.b64decode(b"".join(self.leaf.certificate.split(b"\n")[1:-2]))
        self.messages = [
            SetMembers(members=[]),
            Publish(round=1, member=1, digest="00" * 32, length=1),
            Want(round=1, wants=[]),
            Fetched(round=1, member=1, digest="00" * 32, length=1, source="x"),
            Rejected(what="call", peer="x", member=None, reason="x"),
            configure,
        ]
        self.all: dict[str, Callable[[Input], bool]] = {name: getattr(self, name) for name in NAMES}

    def statements(self, data: Input) -> bool:
        raw = data.rest() if data.below(8) == 0 else data.one([announcement, record])(data)
        accepted = False
        for kind in (Announcement, NodeRecord):
            with contextlib.suppress(Malformed):
                said = kind.parse(raw, RUN)
                # Ed25519 signs the same bytes the same way, so there is nothing in it that was not read.
                assert said.sign(next(key for key in KEYS if key.public == said.node_key)) == raw
                accepted = True
        return accepted

    def taken(self, data: Input) -> bool:
        """What a node does with statements from gossip and from calls, whoever passes them on."""
        sender = data.one([KEYS[0].public, KEYS[2].public, "a peer without a key"])
        if data.byte() & 1:
            return self.node.intake.announcement(announcement(data), sender).verdict is not Verdict.REFUSED
        return self.node.intake.gossip_record(record(data), sender)

    def records(self, data: Input) -> bool:
        count = data.one([0, 1, 2, 2, 3, 40])
        one = record(data)
        body = mutated(data, wire.Records(records=[one if data.below(4) else record(data) for _ in range(count)]))
        length = len(body) if data.below(4) else data.number() % 2**32
        part = data.one([1, 3, 4096]) if len(body) < 4096 else 65536
        stream = Stream(struct.pack(">I", length) + body, part)
        try:
            # Nothing in it waits for anything but the stream, so it ends in one step.
            self.exchange._receive(stream, data.one(KEYS).public).send(None)  # type: ignore[arg-type]
        except StopIteration:
            return True
        except (Malformed, IncompleteReadError):
            pass
        return False

    def announced(self, data: Input) -> bool:
        """What a peer sends over /psyche/announce/1, once its frame has been read."""
        request = wire.AnnounceRequest(announcements=[announcement(data)] * data.one([1, 1, 2, 65]))
        try:
            self.direct._take(changed(data, mutated(data, request))[: direct.MAX_BYTES], data.one(KEYS).public)
        except Malformed:
            return False
        return True

    def stored(self, data: Input) -> bool:
        """Values for Kademlia, and files of known peers."""
        if data.byte() & 1:
            owner = data.one(KEYS).public.hex()
            name = changed(data, f"/psyche-{RUN.hex()[:32]}/{owner}".encode()).decode(errors="replace")
            values = [record(data) for _ in range(1 + data.below(3))]
            assert 0 <= self.values.select(name, values) < len(values)
            try:
                self.values.validate(name, values[0])
            except ValueError:
                return False
            return True
        body = mutated(data, wire.Records(records=[record(data)]))
        raw = peerstore._MAGIC + blake3(body).digest() + body
        self.peers._path.write_bytes(changed(data, raw) if data.byte() & 1 else raw)
        return bool(self.peers.load())

    def gossip(self, data: Input) -> bool:
        """Everything a peer can send over gossipsub: messages, subscriptions, grafts, and what they ask for."""
        rpcs = []
        for _ in range(1 + data.below(3)):
            rpc = rpc_pb2.RPC()
            for _ in range(data.below(3)):
                topic = data.one([*self.topics, "another", "", "x" * 300])
                message = rpc.publish.add(data=data.one([announcement, record])(data), topicIDs=[topic] * data.below(3))
                message.seqno, message.from_id = data.raw(9), data.raw(40)
                rpc.subscriptions.add(subscribe=bool(data.byte() & 1), topicid=topic)
                control = rpc.control
                control.graft.add(topicID=topic)
                control.prune.add(topicID=topic, backoff=data.number() % 2**63)
                control.ihave.add(topicID=topic, messageIDs=[data.raw(30).hex().encode()] * data.one([1, 200]))
                control.iwant.add(messageIDs=[data.raw(30).hex().encode()])
            raw = changed(data, rpc.SerializeToString())
            rpcs.append(varint(len(raw) if data.below(8) else data.number()) + raw)
        stream = Stream(b"".join(rpcs), 65536)
        stream.muxed_conn = SimpleNamespace(peer_id=peer_of(data.one(KEYS).public))
        return trio.run(self._gossip, stream)

    async def _gossip(self, stream: Stream) -> bool:
        pubsub, tasks = self.pubsub, list[Any]()
        pubsub._manager = SimpleNamespace(is_running=True, run_task=lambda work, *given: tasks.append((work, given)))
        # What breaks the handler of a stream ends that stream; what breaks a task would end the host.
        with contextlib.suppress(Exception):
            await pubsub.stream_handler(stream)
        accepted = bool(tasks)
        while tasks:
            work, given = tasks.pop()
            await work(*given)
        return accepted

    def pushes(self, data: Input) -> bool:
        """A member that pushes its blob: header, list and pieces, in any cut, with some of it changed."""
        size = data.one([1, 1000, 1000, 1000, 1000, 1000, 1000, (1 << 20) + 5])
        blob = bytes([7 + data.below(3)]) * size
        digest = blob_digest(blob)
        pieces = [blob[at : at + (1 << 20)] for at in range(0, size, 1 << 20)]
        header = mutated(data, wire.PushHeader(round=1, digest=digest, length=size)) if data.byte() & 1 else None
        parts = [header or wire.PushHeader(round=1, digest=digest, length=size).SerializeToString()]
        if len(pieces) > 1:
            parts.append(changed(data, b"".join(map(piece_digest, pieces))))
        parts += [changed(data, piece) if data.below(3) == 0 else piece for piece in pieces]
        if data.below(4) == 0:
            del parts[data.below(len(parts))]
        receiver, caller = self.node._receiver, KEYS[0].public
        receiver._wants = SimpleNamespace(wanted=lambda round, wanted: size if wanted == digest else None)
        receiver._arrived = lambda digest, sender: None
        with contextlib.suppress(Aborted):
            receiver.receive(caller, iter(parts), Context())
        self.directory._banned.clear()
        path = self.store.path(digest)
        if path is None:
            return False
        assert blob_digest(path.read_bytes()) == digest
        path.unlink()
        return True

    def punches(self, data: Input) -> bool:
        """A Punch in its frame, and a DialBack: what a helper and a target are asked."""
        message = wire.Punch(peer=data.one(KEYS).public, address=address(data), certificate=data.raw(200))
        body = changed(data, mutated(data, message))
        length = len(body) if data.below(4) else data.number() % 2**32
        context = Context()
        context.where = data.one(["ipv4:127.0.0.1:5", "ipv6:%5B::1%5D:5", "unix:", "ipv4:", "", address(data)])
        with contextlib.suppress(Aborted):
            self.dialback.answer(KEYS[0].public, changed(data, mutated(data, wire.DialBackRequest())), context)
        try:
            rendezvous._receive(Stream(struct.pack(">I", length) + body, 4096)).send(None)  # type: ignore[arg-type]
        except StopIteration as ended:
            with contextlib.suppress(rendezvous.Refused):
                self.rendezvous._check(KEYS[0].public, ended.value.peer)
            return True
        except (Malformed, IncompleteReadError):
            pass
        return False

    def bitmaps(self, data: Input) -> bool:
        bitmap, count = data.raw(64), data.one([0, 1, 7, 8, 9, 500])
        held = unpack(bitmap, count)
        assert len(held) == count
        assert set(held) <= {0, 1}
        return unpack(pack(held), count) == held

    def addresses(self, data: Input) -> bool:
        text = data.rest().decode(errors="replace") if data.below(8) == 0 else address(data)
        for split, join in ((split_multiaddr, join_multiaddr), (split_address, join_address)):
            with contextlib.suppress(Malformed):
                ip, port = split(text)
                assert split(join(ip, port)) == (ip, port)
                return True
        return False

    def requests(self, data: Input) -> bool:
        digest = data.one([digest for digest, _ in self.blobs])
        method, message = data.one(
            [
                (self.service.announce, wire.AnnounceRequest(announcements=[announcement(data)])),
                (self.service.since, wire.SinceRequest(round=data.below(12), have=data.raw(40), wanted=[digest])),
                (self.service.manifest, wire.ManifestRequest(digest=digest)),
                (self.service.fetch, wire.FetchRequest(digest=digest, first=data.below(4), count=data.below(4))),
                (self.service.have, wire.HaveRequest(digests=[digest])),
            ]
        )
        raw = changed(data, mutated(data, message))[:MAX_REQUEST_BYTES]
        context = Context()
        with contextlib.suppress(Aborted):
            sent = method(data.one(KEYS).public, raw, context)
            for part in sent if isinstance(sent, Iterator) else [sent]:
                assert len(part) <= MAX_MESSAGE_BYTES
        context.ended()
        return context.aborted is None

    def replies(self, data: Input) -> bool:
        """A member's answers to this node that looks for a blob."""
        size = data.one([1, 1000, 1000, 1000, 1000, 1000, 1000, (1 << 20) + 5])
        blob = bytes([data.below(3)]) * size
        pieces = [blob[at : at + (1 << 20)] for at in range(0, size, 1 << 20)]
        manifest = wire.Manifest(length=size, pieces=b"".join(map(piece_digest, pieces)))
        self.peer.reply = changed(data, mutated(data, manifest))[:MAX_MESSAGE_BYTES]
        for _ in range(data.below(3)):
            kind, at = data.below(4), data.below(len(pieces) + 1)
            if kind == 0:
                pieces.insert(at, data.raw(50))
            elif kind == 1 and pieces:
                del pieces[at % len(pieces)]
            elif pieces:
                pieces[at % len(pieces)] = changed(data, pieces[at % len(pieces)])
        self.peer.pieces = pieces
        digest, kind = blob_digest(blob), data.one(list(Kind))
        want = OpenWant(1, {0: Tree(1, KEYS[0].public, [KEYS[1].public])}, digest, size, kind, 0.0)
        held = data.one([None, unpack(data.raw(2), piece_count(size))])
        try:
            Download(self.tools, want, Choice(KEYS[0].public, Role.HOLDER, held)).run()
        except (CallFailed, BadBytes, NothingYet):
            pass
        finally:
            if want.partial is not None:
                self.tools.holdings.end(want.partial)
        path = self.store.path(digest)
        if accepted := path is not None:
            assert blob_digest(path.read_bytes()) == digest
            path.unlink()
        reply = wire.SinceReply(announcements=[announcement(data)], held=[DIGEST])
        self.peer.reply = changed(data, mutated(data, reply))
        with contextlib.suppress(CallFailed):
            self.links.call(KEYS[0].public, "Since", wire.SinceRequest(), wire.SinceReply, 1.0)
        return accepted

    def certificates(self, data: Input) -> bool:
        der = self.der
        for _ in range(1 + data.below(3)):
            der = changed(data, der)
        pem = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der) + b"-----END CERTIFICATE-----\n"
        with contextlib.suppress(BadCertificate):
            assert identify(changed(data, pem) if data.below(4) == 0 else pem).node_key == KEYS[0].public
            return True
        return False

    def bulk(self, data: Input) -> bool:
        """Both sides of a bulk connection, within TLS."""
        if data.byte() & 1:
            return fuzzing_bulk.answers(data)
        return fuzzing_bulk.requests(data, self.service.pieces, [digest for digest, _ in self.blobs], KEYS[0].public)

    def frames(self, data: Input) -> bool:
        message = data.one(self.messages)
        body = message.model_dump(mode="json")
        for _ in range(data.below(3)):
            name = data.one([*body, "extra"])
            odd = [None, True, -1, 0, 2**64, 1.5, "", "x" * 70, "0" * 64, [], [1], [{}], {}, {"a": 1}, [[[]]], 1e999]
            body[name] = data.one(odd)
        kind = data.one([type(message).__name__, "Stats", "Nonsense", 7, None])
        number = data.one([1, 0, -1, 2**70, "1", None, 1.0])
        raw = changed(data, json.dumps({"id": number, "kind": kind, "body": body}).encode())
        with contextlib.suppress(IpcError):
            decode_frame(raw)
            return True
        return False


@contextlib.contextmanager
def targets() -> Iterator[Targets]:
    """The targets, with a store in memory where the system has such a place."""
    logging.disable(logging.CRITICAL)
    place = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=place if os.access(place, os.W_OK) else None) as folder:
        try:
            yield Targets(Path(folder))
        finally:
            logging.disable(logging.NOTSET)
