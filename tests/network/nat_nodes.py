"""A node's gRPC ends with DialBack and paths, on loopback, for the tests of the NAT ladder."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from psyche_node.faults import Faults
from psyche_node.identity import NodeKey
from psyche_node.network.announcements import Announcements
from psyche_node.network.certificates import issue
from psyche_node.network.directory import Directory
from psyche_node.network.guard import Guard
from psyche_node.network.holdings import Holdings
from psyche_node.network.links import Links, probe
from psyche_node.network.nat.dialback import DialBack
from psyche_node.network.nat.paths import SERVER_SOCKET, Paths
from psyche_node.network.nat.sockets import SocketFolder
from psyche_node.network.reader import Reader
from psyche_node.network.reports import Reporter, Traffic
from psyche_node.network.server import Server
from psyche_node.network.service import NodeService
from psyche_node.network.statements import NodeRecord
from psyche_node.network.store import BlobStore
from psyche_node.network.wire import node_pb2 as wire

RUN = bytes(32)


def until(true: Callable[[], bool]) -> None:
    """Wait until a thread has done something; the test's own timeout ends it."""
    while not true():
        threading.Event().wait(0.005)


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
        return self.links.call(other.key.public, "DialBack", request, wire.DialBackReply, 60.0)

    def close(self) -> None:
        self.paths.close()
        self.links.close()
        self.server.stop()
        self.sockets.close()


def meet(*nodes: Node) -> None:
    for node in nodes:
        node.knows(*(other.record() for other in nodes))


def record_of(number: int, *, private: bool = False) -> NodeRecord:
    key = bytes([number]) * 32
    return NodeRecord(RUN, key, 1, ("/ip4/192.0.2.1/tcp/1",), "192.0.2.1:2", bytes(32), 1, private)
