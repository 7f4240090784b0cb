"""What a hostile peer can cost the gRPC server: each attack has a bound, and another member is served meanwhile."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import h2.config
import h2.connection
import h2.events
import h2.settings
import psutil
import pytest
from grpc_nodes import Node

from psyche_node.identity import NodeKey
from psyche_node.network.certificates import Leaf, issue, null_ca_pem
from psyche_node.network.guard import MAX_CALLS_PER_PEER, MAX_STREAMS, STREAM_SECONDS
from psyche_node.network.links import CallFailed, Cause
from psyche_node.network.server import Limits
from psyche_node.network.service import MAX_MESSAGE_BYTES, MAX_REQUEST_BYTES, SERVICE
from psyche_node.network.wire import node_pb2 as wire

pytestmark = pytest.mark.timeout(240)
PATIENCE = 90.0
# Of the server's two limits of time a test has the one that it waits for short; nobody is late for the other one.
LIMITS = Limits(connections=40, handshake_seconds=PATIENCE, idle_seconds=PATIENCE)
HASTY = replace(LIMITS, handshake_seconds=1.0)
FORGETFUL = replace(LIMITS, idle_seconds=1.5)
MIB = 1 << 20


class Attack:
    """A victim with a small server, a member that it serves, and the means of an attacker."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        self.victim = Node(folder / "victim", limits=limits)
        self.friend = Node(folder / "friend")
        self.member = NodeKey.generate()
        self.victim.directory.set_members(
            dict(enumerate([self.victim.key.public, self.friend.key.public, self.member.public]))
        )
        self.friend.knows(self.victim)
        self.folder, self._hasty = folder, limits.handshake_seconds < PATIENCE
        self._sockets = contextlib.ExitStack()
        self._own = psutil.Process()

    def tcp(self) -> socket.socket:
        return self._sockets.enter_context(socket.create_connection(("127.0.0.1", self.victim.server.port), PATIENCE))

    def tls(self, key: NodeKey | None = None) -> ssl.SSLSocket:
        """A TLS connection with a certificate of ``key``: a stranger's, unless said otherwise."""
        leaf = issue(key or NodeKey.generate())
        (self.folder / "leaf.pem").write_bytes(leaf.key + leaf.certificate)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        context.load_cert_chain(self.folder / "leaf.pem")
        while True:
            try:
                return self._sockets.enter_context(context.wrap_socket(self.tcp()))
            except OSError:
                if not self._hasty:
                    raise
                # This machine stood still for longer than the victim waits.

    def channel(self, leaf: Leaf) -> grpc.Channel:
        options = [
            ("grpc.ssl_target_name_override", self.victim.leaf.name),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_retries", 0),
        ]
        trusted = grpc.ssl_channel_credentials(self.victim.leaf.certificate, leaf.key, leaf.certificate)
        return self._sockets.enter_context(grpc.secure_channel(self.victim.address, trusted, options=options))

    def open(self) -> int:
        """The victim's open connections."""
        connections = self._own.net_connections("tcp")
        return sum(c.laddr.port == self.victim.server.port and c.status == "ESTABLISHED" for c in connections)

    def close_all(self) -> None:
        self._sockets.close()

    def ends(self, left: int = 0) -> None:
        """Wait until no more than ``left`` of the victim's connections are open."""
        until(lambda: self.open() <= left)

    def served(self) -> None:
        """A member is served, over a new connection, within its deadline; its handshake may be late for a hasty one."""

        def asked() -> bool:
            self.friend.links.close()
            try:
                self.friend.ask(self.victim)
            except CallFailed as error:
                if not self._hasty or error.cause is not Cause.UNREACHABLE:
                    raise
                return False
            return True

        until(asked)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def limits() -> Limits:
    return LIMITS


@pytest.fixture
def attack(tmp_path: Path, limits: Limits) -> Iterator[Attack]:
    made = Attack(tmp_path, limits)
    yield made
    made.close_all()
    made.friend.close()
    made.victim.close()


def h2_client(sock: ssl.SSLSocket) -> h2.connection.H2Connection:
    client = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
    client.initiate_connection()
    sock.sendall(client.data_to_send())
    return client


def headers(method: str) -> list[tuple[str, str]]:
    return [
        (":method", "POST"),
        (":scheme", "https"),
        (":path", f"/{SERVICE}/{method}"),
        (":authority", "x"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("grpc-timeout", "60S"),
    ]


def ended(sock: socket.socket) -> bool:
    """Whether the victim has closed the connection, after whatever it had to say."""
    try:
        while sock.recv(65536):
            pass
    except ConnectionError:
        pass
    return True


@pytest.mark.parametrize("limits", [HASTY])
def test_connections_that_say_nothing_or_half_of_it_are_closed(attack: Attack) -> None:
    """A handshake that does not begin, one that stops within its first message, HTTP/2 that does not begin."""
    silent = [attack.tcp() for _ in range(10)]
    stopped = [attack.tcp() for _ in range(10)]
    for sock in stopped:
        sock.sendall(bytes.fromhex("160301020001 0001fc0303".replace(" ", "")))
    speechless = [attack.tls() for _ in range(10)]
    assert attack.open() <= 30
    attack.served()
    for sock in (*silent, *stopped, *speechless):
        assert ended(sock)


@pytest.mark.parametrize("limits", [HASTY])
def test_a_handshake_that_dribbles_is_closed(attack: Attack) -> None:
    """A byte now and then does not buy more time: the limit is one of the whole handshake."""
    sock = attack.tcp()
    sock.settimeout(0.1)
    # A handshake message of 60,000 bytes in TLS records of one byte each: every one is well-formed.
    dribble = iter(b"\x01\x00\xea\x60" + bytes(60_000))

    def closed() -> bool:
        try:
            sock.sendall(b"\x16\x03\x01\x00\x01" + bytes([next(dribble)]))
            return not sock.recv(1000)
        except TimeoutError:
            return False
        except ConnectionError:
            return True

    until(closed)
    attack.served()


@pytest.mark.parametrize("limits", [FORGETFUL])
def test_idle_connections_of_strangers_are_closed(attack: Attack) -> None:
    for _ in range(10):
        # One may be closed before it has said all it had to say.
        with contextlib.suppress(OSError):
            h2_client(attack.tls())
    attack.served()
    attack.ends(left=1)


@pytest.mark.parametrize("limits", [replace(LIMITS, connections=8)])
def test_connections_in_all_are_bounded_and_given_back(attack: Attack, limits: Limits) -> None:
    refused = 0
    while not refused:
        try:
            h2_client(attack.tls())
        except OSError:
            refused += 1
        assert attack.open() <= limits.connections
    assert attack.open() == limits.connections
    attack.close_all()
    until(lambda: attack.open() < limits.connections)
    attack.served()


def test_a_storm_of_reconnecting_members_leaves_nothing(attack: Attack) -> None:
    """Hundreds of connections, each with a call; afterwards nothing is open and no thread more than before."""
    attack.served()
    leaf, threads = issue(attack.member), threading.active_count()
    for _ in range(150):
        with attack.channel(leaf) as channel:
            channel.unary_unary(f"/{SERVICE}/Since")(wire.SinceRequest().SerializeToString(), timeout=PATIENCE)
    attack.served()
    attack.ends(left=1)
    assert threading.active_count() <= threads + 2 * 2 * MAX_STREAMS


def test_a_stranger_that_calls_without_end_does_not_keep_members_out(attack: Attack) -> None:
    channel = attack.channel(issue(NodeKey.generate()))
    call = channel.unary_unary(f"/{SERVICE}/Since")
    stop = threading.Event()

    def flood() -> None:
        while not stop.is_set():
            with contextlib.suppress(grpc.RpcError):
                call(b"", timeout=PATIENCE)

    flooders = [threading.Thread(target=flood) for _ in range(4)]
    for flooder in flooders:
        flooder.start()
    try:
        for _ in range(20):
            attack.friend.ask(attack.victim)
    finally:
        stop.set()
        for flooder in flooders:
            flooder.join()
    assert sum(refusal.count for refusal in attack.victim.reporter.refusals()) > 20
    # It is counted each time, and said once.
    assert len(attack.victim.refusals()) == 1


def test_messages_and_headers_that_are_too_large_are_refused(attack: Attack) -> None:
    channel = attack.channel(issue(attack.member))
    big = channel.unary_unary(f"/{SERVICE}/Since")
    with pytest.raises(grpc.RpcError) as failure:
        big(bytes(MAX_REQUEST_BYTES + 1), timeout=PATIENCE)
    assert failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(grpc.RpcError) as failure:
        big(b"", timeout=PATIENCE, metadata=[("x", "y" * 20_000)])
    assert failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    attack.served()


def test_a_message_that_announces_gigabytes_costs_nothing(attack: Attack) -> None:
    """A length of 4 GiB in a call's first five bytes: refused before anything is allocated for it."""
    sock = attack.tls(attack.member)
    client = h2_client(sock)
    before = psutil.Process().memory_info().rss
    client.send_headers(1, headers("Since"))
    client.send_data(1, b"\0\xff\xff\xff\xff" + bytes(1000))
    sock.sendall(client.data_to_send())
    status = None
    while status is None and (data := sock.recv(65536)):
        for event in client.receive_data(data):
            if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                status = dict(event.headers).get("grpc-status", status)
    assert status == str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
    assert psutil.Process().memory_info().rss - before < 64 * MIB
    attack.served()


def test_calls_that_are_opened_and_reset_do_not_pile_up(attack: Attack) -> None:
    """The attack called rapid reset: streams that are cancelled as soon as they are open."""
    sock = attack.tls(attack.member)
    client = h2_client(sock)
    before = psutil.Process().memory_info().rss
    with contextlib.suppress(OSError, h2.exceptions.ProtocolError):
        for number in range(1, 4000, 2):
            client.send_headers(number, headers("Since"))
            client.reset_stream(number)
            sock.sendall(client.data_to_send())
    attack.served()
    assert psutil.Process().memory_info().rss - before < 64 * MIB


def test_answers_that_nobody_reads_are_few(attack: Attack) -> None:
    """HTTP/2 lets a client say that it takes no bytes. Its calls stay open; beyond some, more are refused."""
    sockets = []
    for _ in range(5):
        sock = attack.tls(attack.member)
        client = h2_client(sock)
        client.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0})
        sock.sendall(client.data_to_send())
        while client.local_settings.initial_window_size:
            client.receive_data(sock.recv(65536))
        for number in range(1, 2 * 12, 2):
            client.send_headers(number, headers("Since"))
            client.send_data(number, bytes(5), end_stream=True)
        sock.sendall(client.data_to_send())
        sock.settimeout(0.2)
        sockets.append((sock, client))
    refused = 0

    def rest_refused() -> bool:
        nonlocal refused
        for sock, client in sockets:
            with contextlib.suppress(TimeoutError):
                for event in client.receive_data(sock.recv(65536)):
                    if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                        status = dict(event.headers).get("grpc-status")
                        refused += status == str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
        return refused == 5 * 12 - MAX_CALLS_PER_PEER

    until(rest_refused)
    attack.served()
    assert attack.victim.guard._open.count(attack.member.public) == MAX_CALLS_PER_PEER
    attack.close_all()
    until(lambda: attack.victim.guard._open.count(attack.member.public) == 0)


def test_a_connection_that_pings_all_the_time_is_closed(attack: Attack) -> None:
    sock = attack.tls(attack.member)
    client = h2_client(sock)
    with contextlib.suppress(OSError):
        for number in range(100):
            client.ping(number.to_bytes(8))
            sock.sendall(client.data_to_send())
    assert ended(sock)
    attack.served()


def test_a_reader_that_stops_keeps_its_place_for_a_while_and_little_memory(attack: Attack) -> None:
    """Members that open every stream and read nothing: their calls are ended when others want the places."""
    now, streams = 0.0, attack.victim.service.pieces._uploads._streams
    streams._clock = lambda: now
    # One stream of each: a place beyond that would be given to whoever has none, at once.
    victim, keys = attack.victim, [NodeKey.generate() for _ in range(MAX_STREAMS)]
    members = [victim.key.public, attack.friend.key.public, *(key.public for key in keys)]
    victim.directory.set_members(dict(enumerate(members)))
    digest, _ = victim.store.put(bytes(64 * MIB), 0)
    request = wire.FetchRequest(digest=digest, first=0, count=64).SerializeToString()
    stalled = []
    for key in keys:
        fetch = attack.channel(issue(key)).unary_stream(f"/{SERVICE}/Fetch")
        stalled.append(fetch(request, timeout=500))
    until(lambda: len(streams._open) == MAX_STREAMS)
    with pytest.raises(CallFailed) as failure:
        list(attack.friend.links.fetch(victim.key.public, digest, 0, 1, PATIENCE))
    assert failure.value.cause is Cause.BUSY
    # Short calls are served all the time.
    attack.served()
    now = STREAM_SECONDS

    def fetched() -> bool:
        try:
            return len(list(attack.friend.links.fetch(victim.key.public, digest, 0, 1, PATIENCE))) == 1
        except CallFailed as error:
            if error.cause is not Cause.BUSY:
                raise
            return False

    until(fetched)
    # Of 64 pieces each, what nobody reads is not even taken from the store: flow control holds.
    assert victim.service._traffic.blob_sent < MAX_STREAMS * 32 * MIB
    for call in stalled:
        call.cancel()
    until(lambda: not streams._open)


def test_a_server_whose_reply_is_too_large_is_given_up(attack: Attack) -> None:
    """The other way round: what a hostile server may send to a client is bounded, too."""
    huge = grpc.server(ThreadPoolExecutor(1), options=[("grpc.max_send_message_length", -1)])
    methods = {
        "Since": grpc.unary_unary_rpc_method_handler(lambda request, context: bytes(MAX_MESSAGE_BYTES + 1)),
        "Fetch": grpc.unary_stream_rpc_method_handler(lambda request, context: iter([bytes(MAX_MESSAGE_BYTES + 1)])),
    }
    huge.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    leaf = attack.victim.leaf
    credentials = grpc.ssl_server_credentials([(leaf.key, leaf.certificate)], null_ca_pem(), require_client_auth=True)
    port = huge.add_secure_port("127.0.0.1:0", credentials)
    huge.start()
    try:
        record = attack.victim.record(time.time_ns() // 1_000_000 + 1000)
        attack.friend.directory.add(replace(record, grpc_address=f"127.0.0.1:{port}"), b"")
        with pytest.raises(CallFailed) as failure:
            attack.friend.ask(attack.victim)
        assert failure.value.cause is Cause.BUSY
        with pytest.raises(CallFailed):
            list(attack.friend.links.fetch(attack.victim.key.public, bytes(32), 0, 1, PATIENCE))
    finally:
        huge.stop(None)
