"""A gRPC server with everything behind it and no libp2p, for tests of the two ends of a call."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from psyche_node.faults import Faults
from psyche_node.identity import NodeKey
from psyche_node.ipc import Message
from psyche_node.network.announcements import Announcements
from psyche_node.network.certificates import issue
from psyche_node.network.directory import Directory
from psyche_node.network.guard import (
    Guard,
)
from psyche_node.network.holdings import Holdings
from psyche_node.network.links import Links
from psyche_node.network.messages import Rejected
from psyche_node.network.reader import Reader
from psyche_node.network.reports import Reporter, Traffic
from psyche_node.network.server import DEFAULT_LIMITS, Limits, Server
from psyche_node.network.service import NodeService
from psyche_node.network.statements import NodeRecord
from psyche_node.network.store import BlobStore
from psyche_node.network.wire import node_pb2 as wire

RUN = bytes(32)


@dataclass
class Node:
    """A gRPC server with everything behind it, and the same node's client."""

    folder: Path
    key: NodeKey = field(default_factory=NodeKey.generate)
    events: list[Message] = field(default_factory=list)
    limits: Limits = DEFAULT_LIMITS

    def __post_init__(self) -> None:
        self.leaf = issue(self.key)
        self.directory = Directory(self.key.public)
        self.reporter = Reporter(self.events.append, self.directory.slot)
        self.store = BlobStore(self.folder)
        self.taken: list[bytes] = []
        self.offers: list[tuple[bytes, bytes]] = []
        self.service = service = NodeService(
            Announcements(RUN, self.directory),
            lambda raw, _: self.taken.append(raw),
            Holdings(Reader(self.store)),
            Traffic(),
            Faults(),
            lambda digest, sender: self.offers.append((digest, sender)),
            lambda _: None,
        )
        self.guard = Guard(self.directory, self.reporter)
        self.server = Server("127.0.0.1", 0, lambda: self.leaf, self.guard, service, self.limits)
        self.address = f"127.0.0.1:{self.server.port}"
        self.links = Links(lambda: self.leaf, self.directory, self.reporter, Traffic())

    def record(self, seq: int = 1) -> NodeRecord:
        return NodeRecord(
            RUN,
            self.key.public,
            seq,
            ("/ip4/127.0.0.1/tcp/1",),
            self.address,
            self.leaf.der_hash,
            self.leaf.expires,
        )

    def knows(self, *others: Node) -> None:
        self.directory.set_members(dict(enumerate(node.key.public for node in (self, *others))))
        for other in others:
            self.directory.add(other.record(time.time_ns() // 1_000_000), b"")

    def ask(self, other: Node) -> wire.SinceReply:
        return self.links.call(other.key.public, "Since", wire.SinceRequest(round=1), wire.SinceReply, 60.0)

    def refusals(self) -> list[str]:
        return [event.reason for event in self.events if isinstance(event, Rejected)]

    def close(self) -> None:
        self.links.close()
        self.server.stop()
