"""Whoever does not prove the node key of a member is refused on both transports, with a log line and a metric."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from forged_certificates import extension_of, forge
from libp2p import new_host
from libp2p.crypto.secp256k1 import create_new_key_pair as create_secp256k1
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key
from libp2p.identity_utils import create_identity_from_seed
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as Noise
from network_driver import RUN, Process
from prometheus_client.parser import text_string_to_metric_families

from psyche_node.evaluation import Measure, Results, TaskResult
from psyche_node.identity import NodeKey
from psyche_node.ipc import IpcError
from psyche_node.metrics import MetricsUnavailable, NodeMetrics, split_address
from psyche_node.network.certificates import Leaf, issue
from psyche_node.network.gossip import Gossip
from psyche_node.network.host import dial, listening, make_host, peer_of
from psyche_node.network.messages import (
    Configure,
    Fetched,
    FetchFailed,
    GetStats,
    MemberEntry,
    NetworkRestarted,
    PeerStats,
    Publish,
    RefusalCount,
    Rejected,
    SetMembers,
    Stats,
    Why,
)
from psyche_node.network.service import SERVICE
from psyche_node.network.statements import parse_bootstrap
from psyche_node.network.statements import split_address as split_ip
from psyche_node.network.wire import node_pb2 as wire
from psyche_node.node.config import NodeConfig
from psyche_node.node.daemon import Node
from psyche_node.node.networking import Network

pytestmark = pytest.mark.timeout(240)
STATS = Stats(
    bytes_sent=30,
    bytes_received=20,
    blob_bytes_sent=10,
    blob_bytes_received=5,
    bulk_bytes_sent=4,
    bulk_bytes_received=3,
    peers=3,
    connected=[1, 2],
    per_peer=[PeerStats(node_id="x", slot=1, connected=True, bytes_sent=1, bytes_received=1, banned=True)],
    refusals=[RefusalCount(what="call", why=Why.NOT_A_MEMBER, count=7)],
)


def scrape(port: int) -> dict[tuple[str, ...], float]:
    """Return the samples by (name, label values...)."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as reply:
        text = reply.read().decode()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def call(address: str, server: bytes, leaf: Leaf | None) -> grpc.StatusCode:
    """Call Since with this client certificate, trusting the server's certificate; return the status."""
    pair = (leaf.key, leaf.certificate) if leaf else (None, None)
    name = x509.load_pem_x509_certificate(server).subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
    options = [("grpc.ssl_target_name_override", str(name)), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.secure_channel(address, grpc.ssl_channel_credentials(server, *pair), options=options) as channel:
        try:
            channel.unary_unary(f"/{SERVICE}/Since")(wire.SinceRequest().SerializeToString(), timeout=60)
        except grpc.RpcError as error:
            return error.code()
        return grpc.StatusCode.OK


async def members(process: Process, *keys: NodeKey) -> None:
    """Make these keys the members, in slot order."""
    entries = [MemberEntry(slot=slot, node_key=key.public.hex()) for slot, key in enumerate(keys)]
    await process.ask(SetMembers(members=entries))


def grpc_intruders(address: str, member: NodeKey) -> dict[str, grpc.StatusCode]:
    server = ssl.get_server_certificate(split_ip(address), timeout=60).encode()
    own = issue(member)
    key = ec.generate_private_key(ec.SECP256R1())
    attempts = {
        "a member": own,
        "none": None,
        "expired": issue(member, lifetime=60, now=time.time() - 3600),
        "of the future": issue(member, now=time.time() + 86400),
        "self-signed": forge(extension=extension_of(own), key=key, issuer_key=key),
        "of another key": forge(extension=extension_of(own)),
        "without its key": replace(own, key=issue(member).key),
        "without an extension": forge(extension=None),
        "a stranger": issue(NodeKey.generate()),
    }
    return {name: call(address, server, leaf) for name, leaf in attempts.items()}


async def libp2p_intruders(victim: bytes, address: str) -> None:
    """A peer with another kind of key, one that claims a key it does not have, and bytes that are no handshake."""
    liar = NodeKey.generate()
    pair = create_identity_from_seed(liar.seed)
    pair.private_key.sign = lambda data: bytes(64)  # type: ignore[method-assign]
    claimed = new_host(key_pair=pair, sec_opt={NOISE: Noise(pair, noise_privkey=create_noise_key().private_key)})
    async with listening(claimed, "127.0.0.1", 0):
        with pytest.raises(Exception, match="fail"):
            await dial(claimed, victim, address, 60.0)
    odd = new_host(key_pair=create_secp256k1())
    async with listening(odd, "127.0.0.1", 0):
        await dial(odd, victim, address, 60.0)
        with trio.fail_after(60):
            while odd.get_network().get_connections(peer_of(victim)):
                await trio.sleep(0.02)
    _, _, ip, _, port = address.split("/")
    rubbish = await trio.open_tcp_stream(ip, int(port))
    async with rubbish:
        await rubbish.send_all(b"GET / HTTP/1.1\r\n\r\n" * 100)
        with trio.fail_after(60), contextlib.suppress(trio.BrokenResourceError):
            while await rubbish.receive_some():
                pass


def test_every_kind_of_intruder_is_refused_logged_and_counted(tmp_path: Path) -> None:
    async def scenario() -> None:
        process = await Process(tmp_path).start([])
        member = NodeKey.generate()
        metrics = NodeMetrics(lambda: asyncio.run_coroutine_threadsafe(stats(), loop).result(60))
        loop = asyncio.get_running_loop()

        async def stats() -> Stats:
            return await process.endpoint.call(GetStats(), Stats)

        try:
            await members(process, process.key, member)
            codes = await asyncio.to_thread(grpc_intruders, process.ready.grpc_address, member)
            denied, closed = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE
            assert codes == {
                "a member": grpc.StatusCode.OK,
                "none": closed,
                "expired": closed,
                "of the future": closed,
                "self-signed": closed,
                "of another key": denied,
                "without its key": codes["without its key"],
                "without an extension": denied,
                "a stranger": denied,
            }
            assert codes["without its key"] is not grpc.StatusCode.OK
            victim, address = parse_bootstrap(process.ready.multiaddrs[0])
            await asyncio.to_thread(trio.run, libp2p_intruders, victim, address)
            for what, why in (
                ("handshake", Why.EXPIRED),
                ("call", Why.IDENTITY),
                ("call", Why.NOT_A_MEMBER),
                ("connection", Why.IDENTITY),
                ("handshake", Why.IDENTITY),
            ):
                async with asyncio.timeout(60):
                    while not any((refusal.what, refusal.why) == (what, why) for refusal in (await stats()).refusals):
                        await asyncio.sleep(0.05)
            with metrics.served("127.0.0.1:0") as port:
                found = await asyncio.to_thread(scrape, port)
            name = "psyche_network_refusals_total"
            assert found[name, "handshake", "expired"] == 2
            assert found[name, "handshake", "identity"] >= 1
            # One without a certificate, and the one that looked up the server's, as every node does: nothing to say.
            assert found[name, "probe", "other"] >= 2
            assert "PEER_DID_NOT_RETURN" not in process.log_text()
            assert found[name, "call", "identity"] == 2
            assert found[name, "call", "not-a-member"] == 1
            assert found[name, "connection", "identity"] == 1
            assert found["psyche_network_up",] == 1
            lines = [line for line in process.log_text().splitlines() if "rejected a" in line]
            for words in (
                "certificate has expired",
                "no libp2p extension",
                "not that of a member",
                "no Ed25519 key",
                "its libp2p handshake failed",
            ):
                assert any(words in line and '"WARNING"' in line for line in lines), words
            assert {"handshake", "call", "connection"} <= {event.what for event in process.seen(Rejected)}
            assert "Traceback" not in process.log_text()
        finally:
            assert await process.stop() == 0

    asyncio.run(scenario())


class Listener:
    """A peer that listens to gossip and writes down what it hears."""

    def __init__(self, key: NodeKey) -> None:
        self.key, self.heard = key, list[bytes]()
        self.subscribed = False

    async def run(self, victim: bytes, address: str, stop: trio.Event) -> None:
        host = make_host(self.key)
        gossip = Gossip(host, RUN, self.key.public, self)
        async with listening(host, "127.0.0.1", 0), gossip.running():
            await dial(host, victim, address, 60.0)
            for topic in (gossip._announcements, gossip._records):
                await gossip._pubsub.wait_for_subscription(peer_of(victim), topic, timeout=60)
            self.subscribed = True
            await stop.wait()

    def gossip_announcement(self, raw: bytes, forwarder: bytes | str) -> bool:
        self.heard.append(raw)
        return True

    def gossip_record(self, raw: bytes, forwarder: bytes | str) -> bool:
        return self.gossip_announcement(raw, forwarder)

    def gossip_bytes(self, peer: bytes, sent: int, received: int) -> None:
        pass

    def allows(self, peer: bytes | str) -> bool:
        return True


def test_gossip_goes_to_members_and_a_stranger_hears_nothing(tmp_path: Path) -> None:
    """Both subscribe. The stranger hears as soon as it is a member, over the connection that it has."""
    member, stranger = Listener(NodeKey.generate()), Listener(NodeKey.generate())
    stop = trio.Event()
    token: list[trio.lowlevel.TrioToken] = []

    async def listen(victim: bytes, address: str) -> None:
        token.append(trio.lowlevel.current_trio_token())
        with trio.fail_after(100):
            async with trio.open_nursery() as nursery:
                for one in (member, stranger):
                    nursery.start_soon(one.run, victim, address, stop)

    async def scenario() -> None:
        process = await Process(tmp_path).start([])
        rounds = itertools.count()

        async def announce_until(condition: Callable[[], bool]) -> None:
            while not condition():
                # What is published is on disk already; gossip alone can carry it to somebody without an address.
                number = next(rounds)
                digest, length = process.store.put(number.to_bytes(8), number)
                await process.ask(Publish(round=number, member=0, digest=digest.hex(), length=length))
                await asyncio.sleep(0.1)

        try:
            await members(process, process.key, member.key)
            victim, address = parse_bootstrap(process.ready.multiaddrs[0])
            attending = asyncio.create_task(asyncio.to_thread(trio.run, listen, victim, address))
            async with asyncio.timeout(60):
                while not (member.subscribed and stranger.subscribed) and not attending.done():
                    await asyncio.sleep(0.05)
                await announce_until(lambda: len(member.heard) >= 3 or attending.done())
                assert stranger.heard == []
                await members(process, process.key, member.key, stranger.key)
                await announce_until(lambda: bool(stranger.heard) or attending.done())
            token[0].run_sync_soon(stop.set)
            await attending
            assert stranger.heard
        finally:
            assert await process.stop() == 0

    asyncio.run(scenario())


def test_where_a_process_crashed_is_told_although_its_standard_error_is_its_own() -> None:
    code = "import os; from psyche_node.network.corelog import CoreLog; CoreLog(); os.abort()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    assert ended.returncode == -signal.SIGABRT
    assert b"Fatal Python error: Aborted" in ended.stderr


# What gRPC 1.85 writes of a channel to a wrong address, between lines of others.
CORE_LINES = b"""the first line
WARNING: All log messages before absl::InitializeLog() is called are written to STDERR
E0000 00:00:1795861963.979123   19831 parse_address.cc:229] invalid ipv4 address: '999.1.1.1'
E0000 00:00:1795861963.979456   19831 legacy_channel.cc:107] channel stack builder failed: UNKNOWN: no valid target
=== Source Location Trace: ===\x20
src/core/util/status_helper.cc:68

src/core/util/status_helper.cc:68
the last line
"""


def test_what_grpc_writes_by_itself_is_lines_of_the_log() -> None:
    """It goes on with names of its source files, in lines of their own: those tell an operator nothing."""
    code = f"""
import os, threading
from psyche_node.log import configure
from psyche_node.network.corelog import CoreLog
CoreLog()
configure("network")
os.write(2, {CORE_LINES!r})
os.close(2)
for thread in threading.enumerate():
    if thread.name == "corelog":
        thread.join()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=True)
    lines = ended.stderr.decode().splitlines()
    assert [line for line in lines if not line.startswith("{")] == ["the first line", "the last line"]
    assert [json.loads(line)["msg"] for line in lines if line.startswith("{")] == [
        "calls between nodes: invalid ipv4 address: '999.1.1.1' (gRPC, parse_address.cc:229)",
        "calls between nodes: channel stack builder failed: UNKNOWN: no valid target (gRPC, legacy_channel.cc:107)",
    ]


# The numbers that a node serves --------------------------------------------------------------------------------------


@pytest.fixture
def metrics() -> NodeMetrics:
    return NodeMetrics(lambda: STATS)


def test_what_is_served_is_what_was_counted(metrics: NodeMetrics) -> None:
    fetched = {"round": 1, "member": 0, "digest": "00", "length": 1}
    metrics.on_event(Fetched(**fetched, source="x"))
    metrics.on_event(FetchFailed(round=1, member=0, digest="00", reason="slow"))
    metrics.on_event(FetchFailed(round=1, member=0, digest="00", reason="gone"))
    metrics.on_event(NetworkRestarted(restarts=1, reason="killed"))
    with metrics.served("127.0.0.1:0") as port:
        assert scrape(port) == {
            ("psyche_network_up",): 1,
            ("psyche_network_restarts_total",): 1,
            ("psyche_blobs_total", "fetched"): 1,
            ("psyche_blobs_total", "failed"): 2,
            ("psyche_network_bytes_total", "sent", "blob"): 10,
            ("psyche_network_bytes_total", "sent", "other"): 20,
            ("psyche_network_bytes_total", "received", "blob"): 5,
            ("psyche_network_bytes_total", "received", "other"): 15,
            ("psyche_network_bulk_bytes_total", "sent"): 4,
            ("psyche_network_bulk_bytes_total", "received"): 3,
            ("psyche_network_peers",): 3,
            ("psyche_network_members",): 2,
            ("psyche_network_private",): 0,
            ("psyche_network_paths",): 0,
            ("psyche_network_banned",): 1,
            ("psyche_network_refusals_total", "call", "not-a-member"): 7,
        }
        with pytest.raises(MetricsUnavailable, match="Choose another"), metrics.served(f"127.0.0.1:{port}"):
            pass


def test_figures_of_tasks_are_served(metrics: NodeMetrics) -> None:
    measures = {"overlong": Measure(value=0.25, stderr=0.1), "tokens": Measure(value=9.0, stderr=None)}
    task = TaskResult(
        task="sums", kind="generate_until", thinking=True, samples=4, repeats=1, few_shot=0, truncated=0,
        measures=measures, task_sha256="aa", data_sha256="bb",
    )  # fmt: skip
    metrics.on_results(Results(round=12, tasks=[task]))
    with metrics.served("127.0.0.1:0") as port:
        served = scrape(port)
    assert {name: value for name, value in served.items() if name[0].startswith("psyche_task")} == {
        ("psyche_task_round",): 12,
        ("psyche_task", "overlong", "sums", "on"): 0.25,
        ("psyche_task", "tokens", "sums", "on"): 9.0,
        ("psyche_task_stderr", "overlong", "sums", "on"): 0.1,
    }


def test_metrics_without_a_network_process_say_so() -> None:
    def gone() -> Stats:
        raise IpcError("the network process is gone")

    with NodeMetrics(gone).served("127.0.0.1:0") as port:
        found = scrape(port)
    assert found["psyche_network_up",] == 0
    assert not any(name[0].startswith("psyche_network_bytes") for name in found)


def test_a_node_serves_them_also_when_its_network_process_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon's own part, over a real network process; what the dead one counted stays counted."""
    monkeypatch.setattr("psyche_node.node.daemon.ASK_SECONDS", 60.0)
    # Bound and not listening: nobody else is given this port before the node listens there.
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    port = reserved.getsockname()[1]
    node = Node(NodeConfig(run="1" * 32, rpc=("http://127.0.0.1:1",), folder=tmp_path, model=tmp_path, data=tmp_path))
    refusals = ("psyche_network_refusals_total", "call", "not-a-member")

    async def scenario() -> None:
        async with contextlib.AsyncExitStack() as stack:
            node._network = network = Network(node._on_event)
            stack.push_async_callback(network.stop)
            node._serve_metrics(f"127.0.0.1:{port}", stack)
            before = await asyncio.to_thread(scrape, port)
            assert (before["psyche_network_up",], before["psyche_network_restarts_total",]) == (0, 0)
            ready = await network.start(
                Configure(folder=str(tmp_path), node_key_path=str(tmp_path / "node.key"), run=RUN.hex())
            )
            keeping = asyncio.create_task(network.keep())
            stack.callback(keeping.cancel)
            server = (await asyncio.to_thread(ssl.get_server_certificate, split_ip(ready.grpc_address))).encode()
            await asyncio.to_thread(call, ready.grpc_address, server, issue(NodeKey.generate()))
            found = await asyncio.to_thread(scrape, port)
            assert (found["psyche_network_up",], found[refusals]) == (1, 1)
            assert network.process_id is not None
            os.kill(network.process_id, signal.SIGKILL)
            async with asyncio.timeout(60):
                while found["psyche_network_restarts_total",] < 1 or not found["psyche_network_up",]:
                    found = await asyncio.to_thread(scrape, port)
            assert found[refusals] == 1

    with reserved:
        asyncio.run(scenario())


@pytest.mark.parametrize("address", ["", "9464", "localhost:9464", "127.0.0.1:", "127.0.0.1:99999", "::1:9464", "[::1"])
def test_what_is_no_address_to_serve_on(address: str) -> None:
    with pytest.raises(ValueError, match="IP"):
        split_address(address)


def test_addresses_to_serve_on() -> None:
    assert split_address("127.0.0.1:9464") == ("127.0.0.1", 9464)
    assert split_address("[::1]:0") == ("::1", 0)
