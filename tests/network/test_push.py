"""What is taken of a blob that a private node pushes, and what not; real gRPC over TLS on loopback."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from psyche_node.faults import Faults
from psyche_node.identity import NodeKey
from psyche_node.ipc import Message
from psyche_node.network import links, push
from psyche_node.network.announcements import Announcements, Verdict
from psyche_node.network.blobs import PIECE_BYTES
from psyche_node.network.certificates import issue
from psyche_node.network.directory import Directory
from psyche_node.network.guard import Guard
from psyche_node.network.holdings import Holdings
from psyche_node.network.links import CallFailed, Cause, Links
from psyche_node.network.messages import Rejected
from psyche_node.network.push import PART_BYTES, PushReceiver, parts_of
from psyche_node.network.pusher import Pusher, _Copies
from psyche_node.network.reader import Reader
from psyche_node.network.reports import Reporter, Traffic
from psyche_node.network.server import Server
from psyche_node.network.service import NodeService
from psyche_node.network.statements import Announcement, NodeRecord
from psyche_node.network.store import BlobStore
from psyche_node.network.wire import node_pb2 as wire

RUN = bytes(32)
ROUND = 7
DATA = bytes(range(256)) * 8192 + b"the last piece is short"
pytestmark = pytest.mark.timeout(240)


class Receiver:
    """A server that takes pushes; ``wants`` is what it looks for: (round, digest) to length."""

    def __init__(self, folder: Path) -> None:
        self.key = NodeKey.generate()
        self.leaf = issue(self.key)
        self.directory = Directory(self.key.public)
        self.events: list[Message] = []
        reporter = Reporter(self.events.append, self.directory.slot)
        self.store = BlobStore(folder)
        reader = Reader(self.store)
        self.announcements = Announcements(RUN, self.directory)
        self.announcements.reached(ROUND)
        self.wants: dict[tuple[int, bytes], int] = {}
        self.arrived: list[tuple[bytes, bytes]] = []
        self.push = PushReceiver(
            self.store,
            reader,
            self.directory,
            self.announcements,
            self,
            reporter,
            Traffic(),
            lambda digest, sender: self.arrived.append((digest, sender)),
        )
        service = NodeService(
            self.announcements, lambda *_: None, Holdings(reader), Traffic(), Faults(), lambda *_: None, lambda _: None
        )
        guard = Guard(self.directory, reporter)
        self.server = Server("127.0.0.1", 0, lambda: self.leaf, guard, service, more=[self.push.handlers()])

    def wanted(self, round: int, digest: bytes) -> int | None:
        return self.wants.get((round, digest))

    def record(self) -> NodeRecord:
        address = f"127.0.0.1:{self.server.port}"
        where = ("/ip4/127.0.0.1/tcp/1",)
        return NodeRecord(RUN, self.key.public, 1, where, address, self.leaf.der_hash, self.leaf.expires)

    def files(self) -> list[str]:
        return [path.name for path in self.store.folder.rglob("*") if path.is_file()]


class Sender:
    """A member that pushes to ``receiver``."""

    def __init__(self, folder: Path, receiver: Receiver) -> None:
        self.key = NodeKey.generate()
        leaf = issue(self.key)
        self.receiver = receiver
        self.directory = directory = Directory(self.key.public)
        members = {0: receiver.key.public, 1: self.key.public}
        for one in (directory, receiver.directory):
            one.set_members(members)
        directory.add(receiver.record(), b"")
        self.links = Links(lambda: leaf, directory, Reporter(lambda event: None, directory.slot), Traffic())
        self.store = BlobStore(folder)
        self.reader = Reader(self.store)

    def blob(self, data: bytes = DATA) -> bytes:
        return self.store.put(data, ROUND)[0]

    def parts(self, digest: bytes) -> list[bytes]:
        return list(parts_of(ROUND, digest, self.reader))

    def push(self, parts: list[bytes] | Iterator[bytes], timeout: float = 60.0) -> Cause | None:
        try:
            self.links.push(self.receiver.key.public, iter(parts), timeout)
        except CallFailed as error:
            return error.cause
        return None

    def announce(self, digest: bytes, length: int, round: int = ROUND) -> None:
        raw = Announcement(RUN, round, self.key.public, digest, length).sign(self.key)
        assert self.receiver.announcements.offer(raw).verdict is Verdict.NEW


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Receiver]:
    made = Receiver(tmp_path / "receiver")
    yield made
    made.server.stop()


@pytest.fixture
def sender(tmp_path: Path, receiver: Receiver) -> Iterator[Sender]:
    made = Sender(tmp_path / "sender", receiver)
    yield made
    made.links.close()


@pytest.mark.parametrize("data", [b"x", bytes(PART_BYTES + 1), bytes(PIECE_BYTES), DATA])
def test_a_blob_that_is_looked_for_arrives_whole(receiver: Receiver, sender: Sender, data: bytes) -> None:
    digest = sender.blob(data)
    receiver.wants[ROUND, digest] = len(data)
    assert sender.push(sender.parts(digest)) is None
    path = receiver.store.path(digest)
    assert path is not None
    assert path.read_bytes() == data
    assert receiver.arrived == [(digest, sender.key.public)]
    assert receiver.files() == [digest.hex()]
    # What is here already is not taken again, and that is no failure.
    assert sender.push(sender.parts(digest)) is None
    assert len(receiver.arrived) == 1


def test_what_nobody_looks_for_is_refused_unless_the_sender_announced_it(receiver: Receiver, sender: Sender) -> None:
    digest, parts = sender.blob(), sender.parts(sender.blob())
    assert sender.push(parts) is Cause.UNWANTED
    receiver.wants[ROUND + 1, digest] = len(DATA)
    receiver.wants[ROUND, digest] = len(DATA) + 1
    assert sender.push(parts) is Cause.UNWANTED
    receiver.wants.clear()
    sender.announce(digest, len(DATA) - 1)
    assert sender.push(parts) is Cause.UNWANTED
    assert receiver.files() == []
    sender.announce(digest, len(DATA), ROUND + 1)
    assert sender.push(list(parts_of(ROUND + 1, digest, sender.reader))) is None
    assert receiver.files() == [digest.hex()]


def test_what_was_announced_and_not_looked_for_is_bounded(
    receiver: Receiver, sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push, "MAX_UNASKED_BYTES", 1000)
    monkeypatch.setattr(push, "MAX_UNASKED_TOTAL", 1500)
    blobs = {round: sender.blob(bytes([round]) * (1001 if round == 3 else 800)) for round in range(3, 7)}
    for round, digest in blobs.items():
        sender.announce(digest, 1001 if round == 3 else 800, round)

    def attempt(round: int) -> Cause | None:
        return sender.push(list(parts_of(round, blobs[round], sender.reader)))

    assert attempt(3) is Cause.BUSY
    assert attempt(4) is None
    assert attempt(5) is Cause.BUSY
    # Asked for meanwhile, or forgotten, it counts no more.
    receiver.push.asked([blobs[4]])
    assert attempt(5) is None
    assert attempt(6) is Cause.BUSY
    receiver.push.forget(6)
    assert attempt(6) is None


def test_what_did_not_arrive_does_not_count(
    receiver: Receiver, sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push, "MAX_UNASKED_TOTAL", len(DATA))
    digest = sender.blob()
    sender.announce(digest, len(DATA))
    for _ in range(2):
        assert sender.push(sender.parts(digest)[:-1]) is Cause.BROKEN
    assert receiver.files() == []
    assert sender.push(sender.parts(digest)) is None


def test_one_wrong_piece_bans_the_sender_and_leaves_nothing(receiver: Receiver, sender: Sender) -> None:
    digest = sender.blob()
    receiver.wants[ROUND, digest] = len(DATA)
    parts = sender.parts(digest)
    parts[-1] = parts[-1][:-1] + b"!"
    assert sender.push(parts) is Cause.BROKEN
    assert receiver.directory.banned(sender.key.public)
    (rejected,) = [event for event in receiver.events if isinstance(event, Rejected)]
    assert (rejected.what, rejected.member) == ("piece", 1)
    assert receiver.files() == []
    assert receiver.arrived == []
    assert sender.push(sender.parts(digest)) is Cause.REFUSED


@pytest.mark.parametrize(
    ("data", "change", "what"),
    [
        (DATA, lambda parts: [parts[0], parts[1][:-1] + b"!", *parts[2:]], "manifest"),
        (b"small", lambda parts: [parts[0], b"smart"], "piece"),
    ],
)
def test_a_list_or_a_piece_that_does_not_lead_to_the_digest_bans_the_sender(
    receiver: Receiver, sender: Sender, data: bytes, change: Callable[[list[bytes]], list[bytes]], what: str
) -> None:
    digest = sender.blob(data)
    receiver.wants[ROUND, digest] = len(data)
    assert sender.push(change(sender.parts(digest))) is Cause.BROKEN
    assert [event.what for event in receiver.events if isinstance(event, Rejected)] == [what]
    assert receiver.files() == []


def header(digest: bytes = bytes(32), length: int = 1, extra: bytes = b"") -> bytes:
    return wire.PushHeader(round=ROUND, digest=digest, length=length).SerializeToString() + extra


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: [],
        lambda parts: [b""],
        lambda parts: [b"\xff" * 40, *parts],
        lambda parts: [header(bytes(31)), *parts[1:]],
        lambda parts: [parts[0] + bytes(200), *parts[1:]],
        lambda parts: parts[:1],
        lambda parts: parts[:-1],
        lambda parts: [*parts, b"more"],
        lambda parts: [*parts[:-1], parts[-1] + b"more"],
    ],
)
def test_too_short_too_long_or_no_header_is_refused_and_leaves_nothing(
    receiver: Receiver, sender: Sender, change: Callable[[list[bytes]], list[bytes]]
) -> None:
    digest = sender.blob()
    receiver.wants[ROUND, digest] = len(DATA)
    assert sender.push(change(sender.parts(digest))) is Cause.BROKEN
    assert receiver.files() == []
    assert receiver.arrived == []
    # That may be an accident, and the right bytes are still welcome.
    assert sender.push(sender.parts(digest)) is None


def test_empty_messages_do_not_end_a_push(receiver: Receiver, sender: Sender) -> None:
    digest = sender.blob(b"blob")
    receiver.wants[ROUND, digest] = 4
    first, data = sender.parts(digest)
    assert sender.push([first, b"", data[:1], b"", data[1:]]) is None


def test_a_sender_has_one_place(receiver: Receiver, sender: Sender) -> None:
    digest, over = sender.blob(), threading.Event()
    receiver.wants[ROUND, digest] = len(DATA)
    parts = sender.parts(digest)

    def in_two_halves() -> Iterator[bytes]:
        yield from parts[:3]
        over.wait(60)
        yield from parts[3:]

    causes: list[Cause | None] = []
    pushing = threading.Thread(target=lambda: causes.append(sender.push(in_two_halves(), 60.0)))
    pushing.start()
    # The file is begun once the header and the list of pieces are read: the place is taken.
    until_taken = time.monotonic() + 60
    while not receiver.files():
        assert time.monotonic() < until_taken
        time.sleep(0.01)
    assert sender.push(parts) is Cause.BUSY
    over.set()
    pushing.join()
    assert causes == [None]


def test_a_sender_that_stops_loses_its_place(
    receiver: Receiver, sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, over = sender.blob(), threading.Event()
    receiver.wants[ROUND, digest] = len(DATA)
    parts = sender.parts(digest)

    def half() -> Iterator[bytes]:
        yield from parts[:3]
        over.wait(60)

    monkeypatch.setattr(push, "HEADER_SECONDS", 1.0)
    monkeypatch.setattr(push, "STREAM_SECONDS", 1.0)
    # Ended by the receiver, long before the sender's own deadline (which would be UNREACHABLE).
    assert sender.push(half(), 60.0) is Cause.BUSY
    over.set()
    monkeypatch.undo()
    while receiver.files():
        time.sleep(0.01)
    while (cause := sender.push(parts)) is Cause.BUSY:
        time.sleep(0.01)
    assert cause is None


@pytest.mark.parametrize(("stall_seconds", "copies"), [(1e9, 1), (3.0, 2)])
def test_a_receiver_that_takes_nothing_does_not_keep_a_blob_from_the_others(
    tmp_path: Path, sender: Sender, monkeypatch: pytest.MonkeyPatch, stall_seconds: float, copies: int
) -> None:
    """Two copies go out at once, and the next member is asked when one of them does not get on."""
    monkeypatch.setattr(links, "PUSH_STALL_SECONDS", stall_seconds)
    # It does not even end those that send nothing.
    monkeypatch.setattr(push, "STREAM_SECONDS", 300.0)
    digest, over = sender.blob(), threading.Event()
    receivers = [Receiver(tmp_path / f"receiver {number}") for number in range(3)]
    stuck, *others = receivers
    begin = stuck.store.begin
    stuck.store.begin = lambda *args: over.wait(300) and begin(*args)  # type: ignore[assignment, return-value]
    members = dict(enumerate([sender.key.public, *(one.key.public for one in receivers)]))
    sender.directory.set_members(members)
    for one in receivers:
        one.directory.set_members(members)
        one.wants[ROUND, digest] = len(DATA)
        sender.directory.add(one.record(), b"")

    async def scenario() -> None:
        keys = [one.key.public for one in receivers]
        pusher = Pusher(sender.links, lambda round: keys, sender.reader, lambda: True)
        with trio.fail_after(120):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pusher.run)
                pusher.published(ROUND, digest, len(DATA), b"")
                while any(one.store.path(digest) is None for one in others[:copies]):
                    await trio.sleep(0.01)
                nursery.cancel_scope.cancel()

    try:
        trio.run(scenario)
    finally:
        over.set()
        for one in receivers:
            one.server.stop()


def test_a_node_that_is_public_for_a_while_pushes_again_afterwards(sender: Sender) -> None:
    private, digest = True, sender.blob()

    async def scenario() -> None:
        nonlocal private
        pusher = Pusher(sender.links, lambda round: [], sender.reader, lambda: private)
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pusher.run)
                pusher.published(ROUND, digest, len(DATA), b"")
                await trio.testing.wait_all_tasks_blocked()
                private = False
                while pusher._blobs[digest].started:
                    await trio.sleep(0.01)
                private = True
                pusher.wake()
                await trio.testing.wait_all_tasks_blocked()
                assert pusher._blobs[digest].started
                nursery.cancel_scope.cancel()

    trio.run(scenario)


def test_a_line_that_is_too_slow_for_two_copies_at_once_gets_one() -> None:
    copies, (a, b, c) = _Copies(), (b"a", b"b", b"c")
    assert copies.next([a, b, c], 0.0) == a
    copies.running.add(a)
    assert copies.next([a, b, c], 0.0) == b
    copies.failed(b, Cause.SLOW, 0.0)
    assert copies.next([a, b, c], 0.0) is None
    copies.running.discard(a)
    copies.holders.add(a)
    assert copies.next([a, b, c], 0.0) == c


def test_what_nobody_looks_for_does_not_keep_out_what_is_looked_for(
    tmp_path: Path, receiver: Receiver, sender: Sender
) -> None:
    """Members that announce large blobs and push them as slowly as they may."""
    others = [Sender(tmp_path / str(number), receiver) for number in range(push.MAX_UNASKED_PUSHES)]
    members = [receiver.key.public, *(one.key.public for one in (sender, *others))]
    receiver.directory.set_members(dict(enumerate(members)))
    begun, over = threading.Semaphore(0), threading.Event()

    def half(parts: list[bytes]) -> Iterator[bytes]:
        yield from parts[:3]
        begun.release()
        over.wait(60)

    pushing = []
    for number, one in enumerate(others):
        digest = one.blob(DATA + bytes([number]))
        one.announce(digest, len(DATA) + 1)
        pushing.append(threading.Thread(target=one.push, args=(half(one.parts(digest)), 60.0)))
        pushing[-1].start()
        assert begun.acquire(timeout=60)
    until_taken = time.monotonic() + 60
    while len(receiver.files()) < len(others):
        assert time.monotonic() < until_taken
        time.sleep(0.01)
    digest = sender.blob()
    sender.announce(digest, len(DATA))
    assert sender.push(sender.parts(digest)) is Cause.BUSY
    receiver.wants[ROUND, digest] = len(DATA)
    assert sender.push(sender.parts(digest)) is None
    over.set()
    for one, thread in zip(others, pushing, strict=True):
        one.links.close()
        thread.join()


def test_a_push_needs_a_member(receiver: Receiver, sender: Sender) -> None:
    digest = sender.blob()
    receiver.wants[ROUND, digest] = len(DATA)
    receiver.directory.set_members({0: receiver.key.public})
    assert sender.push(sender.parts(digest)) is Cause.REFUSED
    assert receiver.files() == []


def test_a_message_larger_than_a_request_may_be_is_refused(receiver: Receiver, sender: Sender) -> None:
    digest = sender.blob()
    receiver.wants[ROUND, digest] = len(DATA)
    assert sender.push([sender.parts(digest)[0], bytes(PIECE_BYTES)]) in (Cause.BUSY, Cause.UNREACHABLE)
    assert receiver.files() == []
