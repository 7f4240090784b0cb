"""Real network processes on loopback, driven as the supervisor drives them. No process is simulated here."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
from libp2p.abc import INetStream
from network_driver import RUN, Process, network
from network_here import Here

from psyche_node.exits import Exit, exit_for, in_words
from psyche_node.identity import load_or_create_node_key
from psyche_node.ipc import RemoteFailure
from psyche_node.network import swarm
from psyche_node.network.blobs import PIECE_BYTES, blob_digest
from psyche_node.network.messages import (
    Announced,
    Configure,
    Fetched,
    FetchFailed,
    Forget,
    GetStats,
    MemberEntry,
    PeerDown,
    PeerUp,
    Publish,
    Ready,
    Rejected,
    SetMembers,
    Stats,
    Want,
    WantEntry,
)
from psyche_node.network.store import BlobStore

pytestmark = pytest.mark.timeout(240)


def blob_of(size: int, seed: int = 0) -> bytes:
    return bytes((index * 31 + seed * 7 + index // 251) % 256 for index in range(size))


async def publish(author: Process, member: int, round: int, data: bytes) -> WantEntry:
    digest, length = author.store.put(data, round)
    await author.ask(Publish(round=round, member=member, digest=digest.hex(), length=length))
    return WantEntry(member=member, digest=digest.hex(), length=length)


def read(process: Process, entry: WantEntry) -> bytes:
    path = process.store.path(bytes.fromhex(entry.digest))
    assert path is not None
    return path.read_bytes()


async def meet(processes: list[Process]) -> None:
    """Make all of them members and wait until each is connected to each."""
    for process in processes:
        await process.members(*processes)
    for process in processes:
        for slot, other in enumerate(processes):
            if other is not process:
                await process.wait(PeerUp, slot=slot)


def beside(started: Callable[[], Awaitable[list[Process]]], scenario: Callable[..., Awaitable[None]]) -> None:
    """Start processes, and run a scenario on trio with them, for one with a node in this process."""
    loop = asyncio.new_event_loop()
    others = loop.run_until_complete(started())
    try:
        trio.run(scenario, *others)
    finally:
        for other in others:
            other.process.kill()
            other.process.wait()
            loop.run_until_complete(other.endpoint.close())
        loop.close()


def test_announce_fetch_and_serve_on_when_the_author_is_gone(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with network(tmp_path, 3) as (author, second, third):
            await meet([author, second, third])
            data = blob_of(2 * PIECE_BYTES + 12_345)
            entry = await publish(author, 0, 5, data)
            heard = await second.wait(Announced, round=5, member=0)
            assert (heard.digest, heard.length) == (entry.digest, entry.length)
            await third.wait(Announced, round=5, member=0)

            await second.ask(Want(round=5, wants=[entry]))
            fetched = await second.wait(Fetched, round=5, member=0)
            assert fetched.source == author.key.node_id
            assert read(second, entry) == data

            author.process.kill()
            await third.wait(PeerDown, slot=0)
            await third.ask(Want(round=5, wants=[entry]))
            fetched = await third.wait(Fetched, round=5, member=0)
            assert fetched.source == second.key.node_id
            assert read(third, entry) == data

            stats = await third.endpoint.call(GetStats(), Stats)
            assert stats.blob_bytes_received == len(data)
            assert stats.bytes_received > stats.blob_bytes_received
            assert stats.connected == [1]
            served = await second.endpoint.call(GetStats(), Stats)
            assert served.blob_bytes_sent == len(data)

            await third.ask(Forget(before_round=6))
            assert third.store.path(bytes.fromhex(entry.digest)) is None
            assert [await process.stop() for process in (second, third)] == [0, 0]

    asyncio.run(scenario())


def test_a_want_is_answered_before_and_after_the_blob_exists(tmp_path: Path) -> None:
    """The commitment on chain can be seen before the author has said anything, and before it is connected."""

    async def scenario() -> None:
        async with network(tmp_path, 2) as (author, other):
            data = blob_of(60_000)
            digest = blob_digest(data)
            entry = WantEntry(member=0, digest=digest.hex(), length=len(data))
            await other.ask(Want(round=3, wants=[entry]))
            await other.wait(FetchFailed, round=3, member=0)
            await meet([author, other])
            failed = await other.wait(FetchFailed, reason="its author " + author.key.node_id + ": " + MISSING)
            assert failed.round == 3
            author.store.put(data, 3)
            await other.wait(Fetched, round=3, member=0)
            assert read(other, entry) == data
            # A want of something that is here already is answered at once, by this node itself.
            other.events.clear()
            await other.ask(Want(round=3, wants=[entry]))
            assert (await other.wait(Fetched, round=3, member=0)).source == other.key.node_id

    asyncio.run(scenario())


MISSING = "not there: this node does not hold the blob"


def test_a_tamperer_is_banned_and_another_holder_used(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with network(tmp_path, 3, faults={1: ["tamper"]}) as (honest, tamperer, third):
            await meet([honest, tamperer, third])
            small, large = blob_of(60_000, 1), blob_of(PIECE_BYTES + 999, 2)
            entries = [await publish(tamperer, 1, 2, small), await publish(tamperer, 1, 3, large)]
            honest.store.put(large, 3)
            for entry, round in zip(entries, (2, 3), strict=True):
                await third.ask(Want(round=round, wants=[entry]))
            rejected = await third.wait(Rejected, what="piece", peer=tamperer.key.node_id)
            assert rejected.member == 1
            assert "banned" in rejected.reason
            # The large one exists elsewhere; the small one nowhere, and nothing of it is kept.
            fetched = await third.wait(Fetched, round=3, member=1)
            assert fetched.source == honest.key.node_id
            assert read(third, entries[1]) == large
            assert third.store.path(blob_digest(small)) is None
            # Not even a good copy is taken from the banned node.
            stats = await third.endpoint.call(GetStats(), Stats)
            assert [peer.slot for peer in stats.per_peer if peer.banned] == [1]
            # The small one comes from whoever has it, later.
            honest.store.put(small, 2)
            assert (await third.wait(Fetched, round=2, member=1)).source == honest.key.node_id
            assert read(third, entries[0]) == small
            warning = next(line for line in third.log_text().splitlines() if "banned" in line)
            for part in ("WARNING", tamperer.key.node_id, "member 1", "round ", entries[0].digest[:8]):
                assert part in warning or entries[1].digest[:8] in warning
            assert await third.stop() == 0
            assert not list(third.folder.glob("blobs/*/*.part"))

    asyncio.run(scenario())


def test_a_blob_of_another_length_than_committed_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with network(tmp_path, 2) as (author, other):
            await meet([author, other])
            data = blob_of(60_000)
            digest, length = author.store.put(data, 1)
            with pytest.raises(RemoteFailure, match="60000 bytes"):
                await author.ask(Publish(round=1, member=0, digest=digest.hex(), length=length + 1))
            await other.ask(Want(round=1, wants=[WantEntry(member=0, digest=digest.hex(), length=length - 7)]))
            rejected = await other.wait(Rejected, what="commitment", member=0)
            assert "59993 bytes were committed to" in rejected.reason
            await other.wait(FetchFailed, round=1, member=0, final=True)
            assert other.store.path(digest) is None

    asyncio.run(scenario())


def test_a_manifest_of_another_length_than_committed_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with network(tmp_path, 2) as (author, other):
            await meet([author, other])
            digest, length = author.store.put(blob_of(PIECE_BYTES + 5), 1)
            await other.ask(
                Want(round=1, wants=[WantEntry(member=0, digest=digest.hex(), length=length + PIECE_BYTES)])
            )
            rejected = await other.wait(Rejected, what="commitment", member=0)
            assert f"{length + PIECE_BYTES} bytes were committed to" in rejected.reason
            await other.wait(FetchFailed, round=1, member=0, final=True)
            assert not list(other.folder.glob("blobs/*/*"))

    asyncio.run(scenario())


def test_an_outsider_is_refused_in_every_way(tmp_path: Path) -> None:
    """Its key is nobody's; it announces by gossip and directly, and tries to fetch."""

    async def scenario() -> None:
        async with network(tmp_path, 3) as (first, second, outsider):
            for process in (first, second, outsider):
                await process.members(first, second)
            await first.wait(PeerUp, slot=1)
            await outsider.wait(PeerUp, slot=0)
            await outsider.wait(PeerUp, slot=1)
            entry = await publish(first, 0, 1, blob_of(60_000))
            await publish(outsider, 2, 1, blob_of(60_000, 9))
            await outsider.ask(Want(round=1, wants=[entry]))
            failed = await outsider.wait(FetchFailed, round=1, member=0)
            while not failed.reason.startswith(f"its author {first.key.node_id}: refused"):
                outsider.events.remove(failed)
                failed = await outsider.wait(FetchFailed, round=1, member=0)
            for member in (first, second):
                refused = await member.wait(Rejected, what="call", peer=outsider.key.node_id)
                assert refused.member is None
                by_gossip = await member.wait(Rejected, what="announcement", peer=outsider.key.node_id)
                assert "not a member" in by_gossip.reason
                assert not [event for event in member.seen(Announced) if event.member == 2]
                lines = [line for line in member.log_text().splitlines() if outsider.key.node_id in line]
                assert any('"WARNING"' in line and "not a member" in line for line in lines)
            await second.ask(Want(round=1, wants=[entry]))
            await second.wait(Fetched, round=1, member=0)
            assert outsider.store.path(bytes.fromhex(entry.digest)) is None
            # Membership is asked on every call: once it is one, the open connection serves it.
            for process in (first, second):
                await process.members(first, second, outsider)
            await outsider.wait(Fetched, round=1, member=0)

    asyncio.run(scenario())


def test_a_frozen_peer_does_not_hold_up_a_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One node runs in this process and would wait for an answer for ever, if it asked nobody else meanwhile."""
    for name in ("download.CALL_SECONDS", "asking.CALL_SECONDS"):
        monkeypatch.setattr(f"psyche_node.network.{name}", 500.0)
    monkeypatch.setattr("psyche_node.network.fetcher.STALL_SECONDS", 1e9)
    key_file, data, warm = tmp_path / "here.key", blob_of(60_000), blob_of(1000, 1)

    async def started() -> list[Process]:
        others: list[Process] = []
        for name in ("frozen", "holder"):
            (tmp_path / name).mkdir()
            others.append(await Process(tmp_path / name).start(others[0].ready.multiaddrs if others else []))
        keys = [*(other.key.public for other in others), load_or_create_node_key(key_file).public]
        for other in others:
            await other.ask(members_of(keys))
        for round, blob in enumerate((warm, data)):
            await publish(others[0], 0, round, blob)
        others[1].store.put(data, 1)
        return others

    def members_of(keys: list[bytes]) -> SetMembers:
        return SetMembers(members=[MemberEntry(slot=slot, node_key=key.hex()) for slot, key in enumerate(keys)])

    async def scenario(frozen: Process, holder: Process) -> None:
        here = Here(tmp_path / "here", holder.ready.multiaddrs, node_key_path=str(key_file))

        async def source_of(round: int, blob: bytes) -> str:
            want = WantEntry(member=0, digest=blob_digest(blob).hex(), length=len(blob))
            await here.node.handle(Want(round=round, wants=[want]))
            await here.until(lambda: any(isinstance(e, Fetched) and e.round == round for e in here.events))
            return next(event.source for event in here.events if isinstance(event, Fetched) and event.round == round)

        async with here.node.running():
            await here.node.handle(members_of([frozen.key.public, holder.key.public, here.key.public]))
            await here.hears(PeerUp(slot=0), PeerUp(slot=1))
            # The channel to it is up, so that nothing but its silence tells.
            assert await source_of(0, warm) == frozen.key.node_id
            frozen.process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, frozen.process.pid, os.WSTOPPED | os.WNOWAIT)
            assert await source_of(1, data) == holder.key.node_id

    beside(started, scenario)


def test_a_restarted_peer_is_found_again_with_its_new_addresses_and_certificate(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with network(tmp_path, 3) as (first, second, restarted):
            await meet([first, second, restarted])
            old = restarted.ready
            warm = await publish(restarted, 2, 1, blob_of(1000))
            await second.ask(Want(round=1, wants=[warm]))
            await second.wait(Fetched, round=1)
            restarted.process.kill()
            for process in (first, second):
                await process.wait(PeerDown, slot=2)
                process.events.clear()
            await restarted.endpoint.close()
            await restarted.start(first.ready.multiaddrs)
            assert restarted.ready.node_id == old.node_id
            assert restarted.ready.grpc_address != old.grpc_address
            await restarted.members(first, second, restarted)
            for process in (first, second):
                await process.wait(PeerUp, slot=2)
            entry = await publish(restarted, 2, 2, blob_of(60_000))
            await second.wait(Announced, round=2, member=2)
            await second.ask(Want(round=2, wants=[entry]))
            assert (await second.wait(Fetched, round=2)).source == restarted.key.node_id

    asyncio.run(scenario())


def test_a_frozen_peer_is_noticed_by_its_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One node runs in this process, with faster pings; the other one is stopped."""
    monkeypatch.setattr(swarm, "PING_EVERY", 0.05)
    monkeypatch.setattr(swarm, "PING_SECONDS", 60.0)
    read, answered = swarm.read_exactly, 0

    async def counted(stream: INetStream, count: int) -> bytes:
        nonlocal answered
        found = await read(stream, count)
        answered += 1
        return found

    monkeypatch.setattr(swarm, "read_exactly", counted)

    async def started() -> list[Process]:
        (tmp_path / "other").mkdir()
        process = await Process(tmp_path / "other").start([])
        await process.members(process)
        return [process]

    async def scenario(other: Process) -> None:
        here = Here(tmp_path / "here", other.ready.multiaddrs)
        async with here.node.running():
            await here.node.handle(SetMembers(members=[MemberEntry(slot=4, node_key=other.key.public.hex())]))
            await here.hears(PeerUp(slot=4))
            # It answers pings for a while, and stays.
            await here.until(lambda: answered >= 5)
            assert PeerDown(slot=4) not in here.events
            monkeypatch.setattr(swarm, "PING_SECONDS", 0.5)
            before = answered
            await here.until(lambda: answered > before + 1 or PeerDown(slot=4) in here.events)
            other.process.send_signal(signal.SIGSTOP)
            await here.hears(PeerDown(slot=4))

    beside(started, scenario)


def test_it_ends_with_its_supervisor_and_leaves_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with network(tmp_path, 2) as (first, second):
            # Both reach all processes of a node, and when to end is the supervisor's decision.
            first.process.send_signal(signal.SIGINT)
            second.process.send_signal(signal.SIGTERM)
            for process in (first, second):
                assert await process.endpoint.call(GetStats(), Stats)
                assert await process.stop() == 0
            for process in (first, second):
                assert "Traceback" not in process.log_text()
                assert all(re.match(r'\{"ts": ', line) for line in process.log_text().splitlines())

    asyncio.run(scenario())


def test_it_ends_when_its_supervisor_does_not_wait_for_it(tmp_path: Path) -> None:
    """Gone before the first word, and gone while the network comes up."""

    async def scenario() -> None:
        for name, speak in (("silent", False), ("hasty", True)):
            (tmp_path / name).mkdir()
            process = Process(tmp_path / name)
            await process.launch()
            if speak:
                configure = Configure(
                    folder=str(process.folder), node_key_path=str(process.folder / "node.key"), run=RUN.hex()
                )
                asking = asyncio.create_task(process.endpoint.call(configure, Ready))
                await asyncio.sleep(0)
                asking.cancel()
            assert await process.stop() == 0
            assert "Traceback" not in process.log_text()
            assert "CRITICAL" not in process.log_text()

    asyncio.run(scenario())


def test_what_an_earlier_process_left_unfinished_is_removed(tmp_path: Path) -> None:
    async def scenario() -> None:
        store = BlobStore(tmp_path / "0" / "blobs")
        (store.folder / "4").mkdir()
        gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
        (store.folder / "4" / ("ab" * 32 + f".{int(gone.stdout)}-x.part")).write_bytes(b"half")
        digest, _ = store.put(b"whole", 4)
        process = Process(tmp_path / "0")
        await process.start([])
        assert [path.name for path in (store.folder / "4").iterdir()] == [digest.hex()]
        assert await process.stop() == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("port", ["grpc_port", "p2p_port", "bulk_port"])
def test_a_taken_port_is_refused_with_a_reason(tmp_path: Path, port: str) -> None:
    async def scenario() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            process = Process(tmp_path)
            await process.launch()
            configure = Configure(
                folder=str(tmp_path),
                node_key_path=str(tmp_path / "node.key"),
                run=RUN.hex(),
                **{port: taken.getsockname()[1]},
            )
            with pytest.raises(RemoteFailure, match=f"{port}: .* is taken") as refused:
                await process.endpoint.call(configure, Ready)
            assert exit_for(refused.value) is Exit.NETWORK, "the daemon ends with what the port means"
            assert in_words(refused.value).startswith(f"{port}: 127.0.0.1:")
            assert await process.stop() == 2
            # It is the supervisor's to say.
            assert all(json.loads(line)["level"] == "DEBUG" for line in process.log_text().splitlines())

    asyncio.run(scenario())


def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        process = Process(tmp_path)
        os.chmod(tmp_path / "node.key", 0o640)
        await process.launch()
        configure = Configure(folder=str(tmp_path), node_key_path=str(tmp_path / "node.key"), run=RUN.hex())
        with pytest.raises(RemoteFailure, match="chmod 600") as refused:
            await process.endpoint.call(configure, Ready)
        assert exit_for(refused.value) is Exit.NODE_KEY
        assert await process.stop() == 2

    asyncio.run(scenario())
