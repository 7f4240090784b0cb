"""Attacks on the bulk port, and by it: each costs the attacker its connection, and members are served as before."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest

from psyche_node.faults import Faults
from psyche_node.identity import NodeKey
from psyche_node.network.announcements import Announcements
from psyche_node.network.blobs import PIECE_BYTES
from psyche_node.network.bulk import client, frames
from psyche_node.network.bulk.client import BulkConnection
from psyche_node.network.bulk.secure import Broken, client_context, server_context
from psyche_node.network.bulk.server import BulkServer, Limits
from psyche_node.network.certificates import Leaf, issue
from psyche_node.network.directory import Directory
from psyche_node.network.guard import Guard
from psyche_node.network.holdings import Holdings
from psyche_node.network.links import CallFailed, Cause
from psyche_node.network.messages import Rejected, Why
from psyche_node.network.reader import Reader
from psyche_node.network.reports import Reporter, Traffic
from psyche_node.network.sending import PieceServer, Status
from psyche_node.network.statements import NodeRecord
from psyche_node.network.store import BlobStore
from psyche_node.network.wire import node_pb2 as wire

pytestmark = pytest.mark.timeout(240)
RUN = bytes(32)
LENGTH = 3 * PIECE_BYTES + 5
PATIENCE = 60.0
# Nobody is late, however slow this machine is; what a test is about, one of these, is short there.
PATIENT = Limits(handshake_seconds=PATIENCE, request_seconds=PATIENCE, stall_seconds=PATIENCE, idle_seconds=PATIENCE)
HASTY = 0.3


class Victim:
    """A bulk server with one blob, a member besides itself, and what it reported."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        self.key, self.member = NodeKey.generate(), NodeKey.generate()
        self.leaf = issue(self.key)
        self.directory = Directory(self.key.public)
        self.directory.set_members({0: self.key.public, 1: self.member.public})
        self.events: list[Any] = []
        self._came = threading.Condition()
        reporter = Reporter(self._emit, self.directory.slot)
        store = BlobStore(folder)
        self.data = os.urandom(LENGTH)
        self.digest, _ = store.put(self.data, 0)
        self.pieces = PieceServer(
            Announcements(RUN, self.directory), Holdings(Reader(store)), Traffic(), Faults(), lambda _: None
        )
        guard = Guard(self.directory, reporter)
        self.server = BulkServer("127.0.0.1", 0, lambda: self.leaf, guard, self.pieces, reporter, limits)
        self._hasty = HASTY in astuple(limits)

    def _emit(self, event: Any) -> None:
        with self._came:
            self.events.append(event)
            self._came.notify_all()

    @property
    def record(self) -> NodeRecord:
        where = ("/ip4/127.0.0.1/tcp/1",)
        leaf, address = self.leaf, f"127.0.0.1:{self.server.port}"
        return NodeRecord(
            RUN, self.key.public, 1, where, "127.0.0.1:1", leaf.der_hash, leaf.expires, bulk_address=address
        )

    def connect(self, leaf: Leaf | None = None) -> BulkConnection:
        return BulkConnection(self.record, client_context(leaf or issue(self.member)))

    def serves(self, connection: BulkConnection | None = None) -> None:
        """Check that a member gets the blob. With a hasty server it may need another connection, for it was late."""
        until = time.monotonic() + PATIENCE
        while True:
            try:
                used = connection or self.connect()
                run = used.ask(self.request(), 4, PATIENCE)
                assert b"".join(bytes(piece) for piece in run) == self.data
                used.close()
                return
            except (OSError, Broken):
                if connection is not None or not self._hasty or time.monotonic() > until:
                    raise

    def request(self, count: int = 4) -> bytes:
        return wire.FetchRequest(digest=self.digest, first=0, count=count).SerializeToString()

    def reported(self, what: str, why: Why) -> Rejected:
        """Wait for a refusal."""

        def found() -> Rejected | None:
            return next((event for event in self.events if (event.what, event.why) == (what, why)), None)

        with self._came:
            assert self._came.wait_for(found, 60), self.events
            event = found()
        assert event is not None
        return event

    def raw(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.server.port), timeout=60)

    def tls(self, leaf: Leaf | None = None) -> ssl.SSLSocket:
        return client_context(leaf or issue(self.member)).wrap_socket(self.raw())


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Victim]:
    victim = Victim(tmp_path, PATIENT)
    yield victim
    victim.server.stop()


@pytest.fixture
def impatient(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Victim]:
    """One whose limit of this name is short."""
    victim = Victim(tmp_path, replace(PATIENT, **{request.param: HASTY}))
    yield victim
    victim.server.stop()


def ended(sock: socket.socket) -> bool:
    """Return whether the other side ends the connection, whatever it still sends before."""
    try:
        while sock.recv(65536):
            pass
    except (ConnectionError, ssl.SSLError):
        return True
    return True


def test_a_stranger_is_told_no_and_closed(victim: Victim) -> None:
    stranger = NodeKey.generate()
    with victim.tls(issue(stranger)) as sock:
        said = sock.recv(4096)
        assert said[:5] == bytes([0, 0, 0, 0, Status.DENIED])
        assert ended(sock)
    assert victim.reported("call", Why.NOT_A_MEMBER).peer == stranger.node_id
    victim.serves()


def test_an_expired_certificate_ends_the_handshake(victim: Victim) -> None:
    with victim.raw() as raw, contextlib.suppress(ssl.SSLError, ConnectionError):
        assert ended(client_context(issue(victim.member, lifetime=-10)).wrap_socket(raw))
    victim.reported("handshake", Why.EXPIRED)
    victim.serves()


def test_no_certificate_ends_the_handshake(victim: Victim) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols([frames.ALPN])
    with victim.raw() as raw, contextlib.suppress(ssl.SSLError, ConnectionError):
        assert ended(context.wrap_socket(raw))
    victim.reported("handshake", Why.IDENTITY)
    victim.serves()


@pytest.mark.parametrize("impatient", ["handshake_seconds"], indirect=True)
@pytest.mark.parametrize("rubbish", [b"GET / HTTP/1.1\r\n\r\n", bytes(5000), b"\x16\x03\x01\xff\xff"])
def test_what_is_not_tls_is_closed(impatient: Victim, rubbish: bytes) -> None:
    with impatient.raw() as sock:
        sock.sendall(rubbish)
        assert ended(sock)
    impatient.reported("handshake", Why.PROTOCOL)
    impatient.serves()


@pytest.mark.parametrize("change", ["version", "alpn"])
def test_older_tls_and_another_protocol_are_refused(victim: Victim, change: str) -> None:
    context = client_context(issue(victim.member))
    if change == "version":
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    else:
        context.set_alpn_protocols(["h2"])
    with victim.raw() as raw, contextlib.suppress(ssl.SSLError, ConnectionError):
        assert ended(context.wrap_socket(raw))
    victim.reported("handshake", Why.PROTOCOL)
    victim.serves()


@pytest.mark.parametrize("impatient", ["handshake_seconds"], indirect=True)
def test_who_says_nothing_is_closed(impatient: Victim) -> None:
    with impatient.raw() as sock:
        assert ended(sock)
    impatient.reported("handshake", Why.PROTOCOL)


@pytest.mark.parametrize("impatient", ["request_seconds"], indirect=True)
def test_half_a_request_is_closed(impatient: Victim) -> None:
    with impatient.tls() as sock:
        sock.sendall(frames.request_frame(impatient.request())[:-1])
        assert ended(sock)
    impatient.serves()


@pytest.mark.parametrize("length", [0, frames.MAX_REQUEST + 1, 2**32 - 1])
def test_a_request_of_no_allowed_length_is_closed(victim: Victim, length: int) -> None:
    with victim.tls() as sock:
        sock.sendall(frames.LENGTH.pack(length))
        assert ended(sock)
    victim.reported("call", Why.MALFORMED)
    victim.serves()


@pytest.mark.parametrize("request_", [b"\xff" * 40, wire.FetchRequest(digest=b"x", count=1).SerializeToString()])
def test_a_request_that_makes_no_sense_is_answered_and_closed(victim: Victim, request_: bytes) -> None:
    with victim.tls() as sock:
        sock.sendall(frames.request_frame(request_))
        assert sock.recv(4096)[:5] == bytes([0, 0, 0, 0, Status.INVALID])
        assert ended(sock)
    victim.serves()


def test_what_is_not_there_is_said_and_the_connection_goes_on(victim: Victim) -> None:
    connection = victim.connect()
    for _ in range(3):
        run = connection.ask(wire.FetchRequest(digest=bytes(32), count=1).SerializeToString(), 1, 60.0)
        with pytest.raises(CallFailed, match="not there") as failure:
            list(run)
        assert failure.value.cause is Cause.MISSING
    victim.serves(connection)


@pytest.mark.parametrize("impatient", ["stall_seconds"], indirect=True)
def test_who_does_not_read_is_closed(impatient: Victim) -> None:
    with impatient.tls() as sock:
        # More than the buffers of both sides' sockets hold.
        for _ in range(12):
            sock.sendall(frames.request_frame(impatient.request()))
        impatient.serves()
        with impatient.server._lock:
            threads = list(impatient.server._threads)
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)


def test_a_member_that_is_put_out_is_refused_in_an_open_connection(victim: Victim) -> None:
    connection = victim.connect()
    assert len(list(connection.ask(victim.request(1), 1, 60.0))) == 1
    victim.directory.set_members({0: victim.key.public})
    with pytest.raises(CallFailed) as failure:
        list(connection.ask(victim.request(1), 1, 60.0))
    assert failure.value.cause is Cause.REFUSED
    victim.reported("call", Why.NOT_A_MEMBER)
    with pytest.raises(Broken):
        list(connection.ask(victim.request(1), 1, 60.0))


def test_connections_are_capped_and_an_idle_one_makes_room(tmp_path: Path) -> None:
    victim = Victim(tmp_path, replace(PATIENT, connections_per_peer=2))
    try:
        kept = [victim.connect() for _ in range(2)]
        for connection in kept:
            assert len(list(connection.ask(victim.request(1), 1, 60.0))) == 1
        victim.serves()
        assert sum(connection.wake() for connection in kept) == 1
    finally:
        victim.server.stop()


def test_a_storm_of_connections_of_one_address_is_refused(tmp_path: Path) -> None:
    victim = Victim(tmp_path, replace(PATIENT, attempts_per_second=0.0, attempts_at_once=3.0))
    try:
        for _ in range(5):
            with victim.raw():
                pass
        victim.reported("connection", Why.TOO_MANY)
        with pytest.raises((OSError, Broken)):
            victim.connect()
    finally:
        victim.server.stop()


def test_handshakes_of_one_address_are_capped(tmp_path: Path) -> None:
    victim = Victim(tmp_path, replace(PATIENT, handshakes_per_address=2))
    try:
        with victim.raw(), victim.raw(), victim.raw():
            victim.reported("connection", Why.TOO_MANY)
        # The others' places are free again when they are gone.
        with victim.server._lock:
            threads = list(victim.server._threads)
        for thread in threads:
            thread.join(60)
        victim.serves()
    finally:
        victim.server.stop()


def test_a_new_certificate_is_shown_without_a_restart(victim: Victim) -> None:
    victim.serves()
    victim.leaf = issue(victim.key)
    victim.serves()


# Hostile servers ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def liar(answer: Callable[[ssl.SSLSocket], None]) -> Iterator[BulkConnection]:
    """A connection to a server that ``answer`` plays, once a request is there."""
    key = NodeKey.generate()
    leaf = issue(key)
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listener.accept()[0] as raw, contextlib.suppress(OSError):
            connection = server_context(leaf).wrap_socket(raw, server_side=True)
            connection.recv(4096)
            answer(connection)
            connection.unwrap()

    thread = threading.Thread(target=serve)
    thread.start()
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    record = NodeRecord(RUN, key.public, 1, (), "", leaf.der_hash, leaf.expires, bulk_address=address)
    connection = BulkConnection(record, client_context(issue(NodeKey.generate())))
    try:
        yield connection
    finally:
        connection.close()
        thread.join(60)
        listener.close()


@pytest.mark.parametrize(
    "said",
    [
        frames.LENGTH.pack(PIECE_BYTES + 1) + b"x",
        frames.LENGTH.pack(2**32 - 1),
        frames.LENGTH.pack(5) + b"abc",
        b"\0\0",
        frames.LENGTH.pack(0) + b"\0",
        b"",
    ],
)
def test_an_answer_that_lies_or_stops_breaks_the_connection(said: bytes) -> None:
    with liar(lambda connection: connection.sendall(said)) as connection, pytest.raises(Broken):
        list(connection.ask(b"x", 1, 60.0))


def test_an_unknown_status_is_a_failure_and_its_reason_is_read() -> None:
    with liar(lambda connection: connection.sendall(bytes.fromhex("00000000 63 03") + b"\xffno")) as connection:
        with pytest.raises(CallFailed, match="no") as failure:
            list(connection.ask(b"x", 1, 60.0))
        assert failure.value.cause is Cause.BROKEN


def test_a_server_that_says_nothing_is_left_when_somebody_cancels() -> None:
    asked, done = threading.Event(), threading.Event()

    def silent(connection: ssl.SSLSocket) -> None:
        asked.set()
        done.wait(60)

    with liar(silent) as connection:
        run = connection.ask(b"x", 1, 60.0)
        canceller = threading.Thread(target=lambda: (asked.wait(60), run.cancel()))
        canceller.start()
        with pytest.raises(Broken):
            list(run)
        assert connection.dropped
        done.set()
        canceller.join()


def test_whoever_holds_another_key_or_certificate_is_not_talked_to(victim: Victim) -> None:
    for record in (
        replace(victim.record, tls_leaf=hashlib.sha256(b"").digest()),
        replace(victim.record, node_key=victim.member.public),
    ):
        with pytest.raises(client.WrongNode):
            BulkConnection(record, client_context(issue(victim.member)))
