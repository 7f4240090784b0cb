"""Nodes whose exchange is real: gRPC with mutual TLS on loopback, real stores. Many in a process, without libp2p."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from pathlib import Path

import trio
import trio.testing

from psyche_node.faults import Faults
from psyche_node.identity import NodeKey
from psyche_node.ipc import Message
from psyche_node.network.announcements import Announcements
from psyche_node.network.bulk.lanes import Lanes
from psyche_node.network.bulk.server import BulkServer
from psyche_node.network.certificates import issue
from psyche_node.network.directory import Directory
from psyche_node.network.fanout import Tree
from psyche_node.network.fetcher import Fetcher
from psyche_node.network.guard import Guard
from psyche_node.network.holdings import Holdings
from psyche_node.network.links import Links
from psyche_node.network.messages import Fetched, Kind, Rejected
from psyche_node.network.quality import Quality
from psyche_node.network.reader import Reader
from psyche_node.network.reports import Reporter, Traffic
from psyche_node.network.server import Server
from psyche_node.network.service import NodeService
from psyche_node.network.statements import NodeRecord
from psyche_node.network.store import BlobStore

RUN = bytes(32)


class ExchangeNode:
    """Everything of a network process but libp2p, the announcements and the supervisor."""

    def __init__(self, folder: Path, key: NodeKey | None = None, faults: Iterable[str] = ()) -> None:
        self.folder = folder
        self.key = key or NodeKey.generate()
        self.leaf = issue(self.key)
        self.events: list[Message] = []
        self._came = trio.Event()
        self._token = trio.lowlevel.current_trio_token()
        self.directory = Directory(self.key.public)
        self.reporter = Reporter(self._emit, self.directory.slot)
        self.traffic = Traffic()
        self.store = BlobStore(folder)
        self.store.sweep()
        self.reader = Reader(self.store)
        self.holdings = Holdings(self.reader)
        self.quality = Quality()
        self.announcements = Announcements(RUN, self.directory)
        self.links = Links(lambda: self.leaf, self.directory, self.reporter, self.traffic)
        self.lanes = Lanes(self.links, lambda: self.leaf, self.directory, self.reporter, self.traffic)
        self.fetcher = Fetcher(
            self.store,
            self.reader,
            self.holdings,
            self.links,
            self.lanes,
            self.directory,
            self.announcements,
            self.quality,
            self.reporter,
            lambda raw, sender: None,
        )
        self.service = NodeService(
            self.announcements,
            lambda raw, sender: None,
            self.holdings,
            self.traffic,
            Faults.parse(faults),
            self._offered,
            self.quality.heard,
        )
        guard = Guard(self.directory, self.reporter)
        self.server = Server("127.0.0.1", 0, lambda: self.leaf, guard, self.service)
        self.bulk = BulkServer("127.0.0.1", 0, lambda: self.leaf, guard, self.service.pieces, self.reporter)
        # Where others are told that the bulk server is; empty: nowhere.
        self._seq = 0
        self.bulk_address = f"127.0.0.1:{self.bulk.port}"

    def _offered(self, digest: bytes, sender: bytes) -> None:
        trio.from_thread.run_sync(self.fetcher.invited, digest, sender, trio_token=self._token)

    def _emit(self, message: Message) -> None:
        def take() -> None:
            self.events.append(message)
            self._came.set()
            self._came = trio.Event()

        self._token.run_sync_soon(take)

    @property
    def record(self) -> NodeRecord:
        address = f"127.0.0.1:{self.server.port}"
        # A later record replaces an earlier one, even of the same millisecond.
        self._seq = max(self._seq + 1, time.time_ns() // 1_000_000)
        return NodeRecord(
            RUN,
            self.key.public,
            self._seq,
            ("/ip4/127.0.0.1/tcp/1",),
            address,
            self.leaf.der_hash,
            self.leaf.expires,
            bulk_address=self.bulk_address,
        )

    async def fetched(self, digest: bytes, seconds: float = 60.0) -> Fetched:
        """Wait until a wanted blob is here."""
        return await self.event(lambda event: isinstance(event, Fetched) and event.digest == digest.hex(), seconds)  # type: ignore[return-value]

    async def event(self, matches: Callable[[Message], bool], seconds: float = 60.0) -> Message:
        """Wait for an event."""
        with trio.fail_after(seconds):
            while True:
                for event in self.events:
                    if matches(event):
                        return event
                await self._came.wait()

    def rejected(self) -> list[Rejected]:
        return [event for event in self.events if isinstance(event, Rejected)]

    def put(self, data: bytes, round: int = 0, kind: Kind = Kind.UPDATE) -> bytes:
        """Keep a blob of this node's own, as its author. Returns its digest."""
        digest, _ = self.store.put(data, round)
        self.fetcher.published(digest, kind, round)
        return digest

    def uploaded(self) -> int:
        """Return the bytes of pieces that this node has sent."""
        return self.traffic.blob_sent

    def kill(self) -> None:
        """Stop answering: connections are refused from now on."""
        self.server.stop()
        self.bulk.stop()

    def close(self) -> None:
        self.lanes.close()
        self.links.close()
        self.kill()


@contextlib.asynccontextmanager
async def nodes(
    folder: Path, count: int, faults: dict[int, list[str]] | None = None, keys: Sequence[NodeKey] = ()
) -> AsyncIterator[list[ExchangeNode]]:
    """Run nodes that are all members, know each other, and fetch."""
    keys = keys or [NodeKey.generate() for _ in range(count)]
    made = [ExchangeNode(folder / str(n), keys[n], (faults or {}).get(n, ())) for n in range(count)]
    introduce(made)
    try:
        async with trio.open_nursery() as nursery:
            for node in made:
                nursery.start_soon(node.fetcher.run)
            await trio.testing.wait_all_tasks_blocked()
            yield made
            nursery.cancel_scope.cancel()
    finally:
        closing = [threading.Thread(target=node.close) for node in made]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join()


def introduce(made: list[ExchangeNode]) -> None:
    """Make them members, in slot order, that know each other's addresses."""
    records = [node.record for node in made]
    for node in made:
        node.directory.set_members({slot: other.key.public for slot, other in enumerate(made)})
        for record in records:
            node.directory.add(record, b"")


def tree_of(made: list[ExchangeNode], round: int, author: int = 0) -> Tree:
    """Return the tree that they all use for an author's update of a round."""
    return Tree(round, made[author].key.public, [node.key.public for node in made])


def in_trio(test: Callable[..., object]) -> Callable[..., None]:
    """Run a test that is a coroutine on trio."""

    @functools.wraps(test)
    def run(*arguments: object, **named: object) -> None:
        trio.run(functools.partial(test, *arguments, **named))  # type: ignore[arg-type]

    return run


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that no event tells of."""
    with trio.fail_after(60):
        while not condition():
            await trio.sleep(0.01)


def held(node: ExchangeNode, digest: bytes) -> int:
    """Return how many pieces a node has of a blob that it is receiving."""
    partial = node.holdings.partial(digest)
    return 0 if partial is None else int.from_bytes(partial.bitmap(), "little").bit_count()


class Gate:
    """Lets a node serve the first ``count`` pieces of blobs, and makes it stop at any other until opened."""

    def __init__(self, holdings: Holdings, count: int) -> None:
        self._count = count
        self._opened = threading.Event()
        self._pieces = holdings.pieces
        holdings.pieces = self._gated  # type: ignore[method-assign]

    def _gated(self, digest: bytes, run: range) -> Iterator[bytes]:
        for index, piece in zip(run, self._pieces(digest, run), strict=False):
            if index >= self._count:
                self._opened.wait(60)
            yield piece

    def open(self) -> None:
        self._opened.set()
