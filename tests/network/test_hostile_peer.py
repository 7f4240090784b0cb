"""A libp2p peer that sends rubbish to a real network process: it is refused, counted, and the process goes on."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import struct
import threading
from pathlib import Path

import pytest
import trio
from libp2p.abc import IHost, INetStream
from libp2p.custom_types import TProtocol
from libp2p.host.exceptions import StreamFailure
from libp2p.io.exceptions import IOException
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V12 as GOSSIP
from libp2p.stream_muxer.exceptions import MuxedStreamError
from network_driver import RUN, Process

from psyche_node.identity import NodeKey
from psyche_node.network.gossip import Gossip
from psyche_node.network.host import dial, listening, make_host, peer_of
from psyche_node.network.messages import GetStats, Rejected, Stats
from psyche_node.network.records import MAX_BYTES, PROTOCOL
from psyche_node.network.statements import Announcement, NodeRecord, parse_bootstrap
from psyche_node.network.wire import node_pb2 as wire

pytestmark = pytest.mark.timeout(240)


class Indifferent:
    """Handlers of a node that takes and passes on everything."""

    def allows(self, peer: bytes | str) -> bool:
        return True

    def gossip_announcement(self, raw: bytes, forwarder: bytes | str) -> bool:
        return True

    def gossip_record(self, raw: bytes, forwarder: bytes | str) -> bool:
        return True

    def records_received(self, raw: list[bytes], sender: bytes) -> list[bytes]:
        return []

    def connection_changed(self, peer: bytes, up: bool) -> None:
        pass

    def gossip_bytes(self, peer: bytes, sent: int, received: int) -> None:
        pass


def record_of(key: NodeKey) -> bytes:
    return NodeRecord(RUN, key.public, 1, ("/ip4/127.0.0.1/tcp/9",), "127.0.0.1:9", bytes(32), 1).sign(key)


async def opened(host: IHost, victim: bytes, protocol: TProtocol = PROTOCOL) -> INetStream:
    """Open a stream; on a loaded machine libp2p's negotiation may need a second attempt."""
    with trio.fail_after(60):
        while True:
            with contextlib.suppress(StreamFailure):
                return await host.new_stream(peer_of(victim), [protocol])


async def attack(victim: bytes, address: str, refused: threading.Event) -> list[bytes]:
    """Send rubbish by gossip and over the record protocol; return the records that the victim gives to a stranger.

    Goes on announcing, each time something new, until the victim has ``refused`` it: gossip may lose a message.
    """
    key = NodeKey.generate()
    host = make_host(key)
    gossip = Gossip(host, RUN, key.public, Indifferent())
    async with listening(host, "127.0.0.1", 0), gossip.running():
        await dial(host, victim, address, 60.0)
        with trio.fail_after(60):
            for topic in (gossip._announcements, gossip._records):
                await gossip._pubsub.wait_for_subscription(peer_of(victim), topic)
        for rubbish in (b"", b"\xff" * 40, bytes(100_000), wire.Signed(body=b"x").SerializeToString()):
            await gossip.announcement(rubbish)
            await gossip.record(rubbish)
        # Frames that lie about their length, that stop, that do not parse, that are no records.
        for frame in (
            struct.pack(">I", MAX_BYTES + 1),
            struct.pack(">I", 2**32 - 1) + b"x",
            struct.pack(">I", 4) + b"\xff" * 4,
            b"\0",
        ):
            stream = await opened(host, victim)
            # It may be reset while this side still writes.
            with contextlib.suppress(IOException, MuxedStreamError):
                await stream.write(frame)
                await stream.close()
        # Gossip messages that do not parse: not a protobuf, an id that is not UTF-8, one that ends too early.
        for rpc in (b"\xff\xff\xff", bytes.fromhex("1a080a060a00120280ff"), b"\x12\x7f"):
            stream = await opened(host, victim, GOSSIP)
            with contextlib.suppress(IOException, MuxedStreamError):
                await stream.write(bytes([len(rpc)]) + rpc)
                await stream.close()
        # It introduces itself, and a hundred made-up others.
        made_up = [record_of(NodeKey.generate()) for _ in range(100)]
        body = wire.Records(records=[record_of(key), b"rubbish", *made_up]).SerializeToString()
        answers = []
        for _ in range(2):
            stream = await opened(host, victim)
            await stream.write(struct.pack(">I", len(body)) + body)
            with trio.fail_after(60):
                answer = bytearray()
                while len(answer) < 4 or len(answer) < 4 + struct.unpack(">I", answer[:4])[0]:
                    answer += await stream.read(65536)
            answers.append(bytes(answer[4:]))
        with trio.fail_after(60):
            for number in itertools.count():
                await gossip.announcement(Announcement(RUN, number, key.public, bytes(32), 1).sign(key))
                if await trio.to_thread.run_sync(refused.wait, 0.25):
                    break
        message = wire.Records()
        message.ParseFromString(answers[1])
        return list(message.records)


def test_rubbish_is_refused_and_the_process_goes_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        process = await Process(tmp_path).start([])
        try:
            await process.members(process)
            victim, address = parse_bootstrap(process.ready.multiaddrs[0])
            refused_all = threading.Event()
            async with asyncio.TaskGroup() as tasks:  # ends at once when the attack itself fails
                attacking = tasks.create_task(asyncio.to_thread(trio.run, attack, victim, address, refused_all))
                await process.wait(Rejected, what="announcement")
                await process.wait(Rejected, what="record")
                refused_all.set()
            records = attacking.result()
            # Its own record and the stranger's, and none of the made-up ones.
            authors = [NodeRecord.parse(raw, RUN).node_id for raw in records]
            assert authors[0] == process.key.node_id
            assert len(authors) == 2
            refused = {event.what for event in process.seen(Rejected)}
            assert refused == {"announcement", "record"}
            assert all(event.member is None for event in process.seen(Rejected))
            await process.members(process)
            assert (await process.endpoint.call(GetStats(), Stats)).bytes_received > 0
            assert "Traceback" not in process.log_text()
            assert "CRITICAL" not in process.log_text()
        finally:
            assert await process.stop() == 0

    asyncio.run(scenario())
