"""How a node finds the others when nobody tells it: from its disk, from Kademlia, on the local network."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import stat
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import trio
from network_driver import RUN, Process, network
from network_here import Here, nodes
from zeroconf import ServiceStateChange, Zeroconf

from psyche_node.identity import NodeKey
from psyche_node.network import health, kademlia, lan, swarm
from psyche_node.network.addresses import announced_host
from psyche_node.network.directory import MAX_CANDIDATES, Directory, Known
from psyche_node.network.health import PartDied
from psyche_node.network.messages import Announced, MemberEntry, PeerUp, Publish, Rejected, SetMembers
from psyche_node.network.peerstore import MAX_BYTES, MAX_RECORDS, Peerstore
from psyche_node.network.statements import NodeRecord

pytestmark = pytest.mark.timeout(240)


def record_of(key: NodeKey, run: bytes = RUN, seq: int = 1, expires: float = 2**40) -> Known:
    record = NodeRecord(run, key.public, seq, ("/ip4/127.0.0.1/tcp/9",), "127.0.0.1:9", bytes(32), int(expires))
    return Known(record, record.sign(key))


# On disk -----------------------------------------------------------------------------------------------------------


def test_a_node_whose_bootstrap_is_gone_finds_the_network_from_its_disk(tmp_path: Path) -> None:
    """It learns of the second node from the first, which then dies; it knows nobody else when it comes back."""

    async def scenario() -> None:
        async with network(tmp_path, 3) as (bootstrap, second, third):
            for process in (bootstrap, second, third):
                await process.members(bootstrap, second, third)
            await third.wait(PeerUp, slot=1)
            # Killed, as a machine that loses its power is: what it knew was written before.
            peers = third.folder / "peers"
            while not peers.exists() or len(Peerstore(peers, RUN).load()) < 2:
                await asyncio.sleep(0.05)
            assert stat.S_IMODE(peers.stat().st_mode) == 0o600
            for process in (bootstrap, third):
                process.process.kill()
            await third.endpoint.close()
            third.events.clear()
            second.events.clear()
            await third.start(bootstrap.ready.multiaddrs)
            # Also before it has been told who the members are: the connection is there, the name of it follows.
            await third.members(bootstrap, second, third)
            await third.wait(PeerUp, slot=1)
            await second.wait(PeerUp, slot=2)
            digest, length = second.store.put(b"after", 1)
            await second.ask(Publish(round=1, member=1, digest=digest.hex(), length=length))
            await third.wait(Announced, round=1, member=1)

    asyncio.run(scenario())


def test_the_file_survives_what_can_happen_to_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "peers"
    now = 1000.0
    keys = [NodeKey.generate() for _ in range(4)]
    good, expired, other_run, last = (
        record_of(keys[0]),
        record_of(keys[1], expires=now),
        record_of(keys[2], run=bytes(32)),
        record_of(keys[3], expires=now + 1),
    )
    store = Peerstore(path, RUN, clock=lambda: now)
    assert store.load() == []
    store.save([one.raw for one in (good, expired, other_run, last)])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.with_suffix(".new").exists()
    assert Peerstore(path, RUN, clock=lambda: now).load() == [good, last]

    whole = path.read_bytes()
    changed = whole[:60] + bytes([whole[60] ^ 1]) + whole[61:]
    for damaged in (whole[:-1], whole[:40], b"", b"x" * (MAX_BYTES + 1), changed):
        path.write_bytes(damaged)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert Peerstore(path, RUN).load() == []
        assert "damaged" in caplog.text
        assert not path.exists()
        assert path.with_suffix(".damaged").read_bytes() == damaged
    # It starts anew, and holds no more than it may.
    store.save([bytes([index % 256, index // 256]) for index in range(MAX_RECORDS + 1)])
    assert len(path.read_bytes()) < MAX_BYTES
    written = path.stat().st_mtime_ns
    store.save([bytes([index % 256, index // 256]) for index in range(MAX_RECORDS + 1)])
    assert path.stat().st_mtime_ns == written
    # A folder that cannot be written to is a line in the log.
    with caplog.at_level(logging.WARNING):
        Peerstore(tmp_path / "nowhere" / "peers", RUN).save([good.raw])
    assert "cannot be written" in caplog.text


def test_what_is_kept_is_members_and_bootstrap_nodes() -> None:
    own, member, bootstrap, stranger = (record_of(NodeKey.generate()) for _ in range(4))
    directory = Directory(own.record.node_key)
    for known in (own, member, bootstrap, stranger):
        directory.add(known.record, known.raw)
    directory.set_members({0: own.record.node_key, 1: member.record.node_key})
    assert set(directory.lasting([bootstrap.record.node_key])) == {member.raw, bootstrap.raw}


def test_remembered_records_are_not_crowded_out_before_the_members_are_known() -> None:
    own, *remembered = (record_of(NodeKey.generate()) for _ in range(MAX_CANDIDATES + 6))
    directory = Directory(own.record.node_key)
    directory.remember([own, *remembered])
    for known in (record_of(NodeKey.generate()) for _ in range(MAX_CANDIDATES + 5)):
        assert directory.add(known.record, known.raw)
    kept = set(directory.raw_records(1000))
    assert kept >= {known.raw for known in remembered}
    assert len(kept) == len(remembered) + MAX_CANDIDATES
    assert set(directory.lasting([])) == {known.raw for known in remembered}


# In one process ------------------------------------------------------------------------------------------------------


def test_kademlia_finds_the_record_of_a_member_that_nobody_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gossip and the exchange of records are off: two nodes know the one in the middle, and Kademlia."""
    monkeypatch.setattr(kademlia, "PUBLISH_AFTER", (0.0, 0.0))
    monkeypatch.setattr(kademlia, "LOOK_EVERY", 0.2)

    async def scenario() -> None:
        async with nodes(tmp_path, 3) as (middle, left, right):
            for here in (middle, left, right):
                here.node._swarm._records.ask = _nothing  # type: ignore[method-assign]
                here.node._swarm.gossip.record = _nothing  # type: ignore[method-assign]
            for known, by in ((left, middle), (right, middle), (middle, left), (middle, right)):
                record = known.node._directory.known(known.key.public)
                assert record is not None
                by.node._directory.add(record.record, record.raw)
            for here in (middle, left, right):
                await here.members(middle, left, right)
            await left.until(lambda: left.node._directory.record(right.key.public) is not None)
            await right.until(lambda: right.node._directory.record(left.key.public) is not None)
            await left.until(lambda: PeerUp(slot=2) in left.events)

            # What is not a member's own record, or of a node that is none, is not stored anywhere.
            dht = left.node._swarm.kademlia
            stranger = NodeKey.generate()
            for key, value in (
                (stranger.public, record_of(stranger).raw),
                (right.key.public, record_of(left.key).raw),
                (right.key.public, b"rubbish"),
                (right.key.public, record_of(right.key, run=bytes(32)).raw),
            ):
                stored = await dht.service.value_store._store_at_peer(
                    middle.node._swarm._host.get_id(), dht.name(key).encode(), value
                )
                assert not stored
            # An old record does not replace a new one.
            name = dht.name(right.key.public).encode()
            kept = middle.node._swarm.kademlia.service.value_store
            mine = right.node._directory.known(right.key.public)
            assert mine is not None
            await right.node._swarm.kademlia.publish(mine.raw)
            await left.until(lambda: kept.get(name) is not None)
            assert not await dht.service.value_store._store_at_peer(
                middle.node._swarm._host.get_id(), name, record_of(right.key, seq=1).raw
            )
            stored_record = kept.get(name)
            assert stored_record is not None
            assert stored_record.value == mine.raw

    trio.run(scenario)


async def _nothing(*_: object) -> None:
    pass


def test_members_are_looked_for_as_soon_as_they_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first exchange of records was before that, and without anybody missing the next one is not due for long."""
    monkeypatch.setattr(swarm, "RECORDS_EVERY", 1e9)
    monkeypatch.setattr(kademlia, "LOOK_EVERY", 1e9)

    async def scenario() -> None:
        bootstrap = Here(tmp_path / "bootstrap", [])
        async with bootstrap.node.running() as ready:
            early, late = (Here(tmp_path / name, ready.multiaddrs) for name in ("early", "late"))
            for here in (bootstrap, early, late):
                here.node._swarm.gossip.record = _nothing  # type: ignore[method-assign]
            async with early.node.running():
                await early.until(lambda: early.node._directory.known(bootstrap.key.public) is not None)
                async with late.node.running():
                    await bootstrap.until(lambda: bootstrap.node._directory.known(late.key.public) is not None)
                    assert early.node._directory.known(late.key.public) is None
                    await early.members(bootstrap, early, late)
                    await early.until(lambda: early.node._directory.record(late.key.public) is not None)

    trio.run(scenario)


def test_kademlia_is_for_members_only(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with nodes(tmp_path, 2) as (member, stranger):
            await member.members(member)
            await stranger.members(member, stranger)
            await stranger.until(lambda: PeerUp(slot=0) in stranger.events)
            dht = stranger.node._swarm.kademlia
            mine = stranger.node._directory.known(stranger.key.public)
            assert mine is not None
            name = dht.name(stranger.key.public).encode()
            host = member.node._swarm._host.get_id()
            assert not await dht.service.value_store._store_at_peer(host, name, mine.raw)
            # As a member it may.
            await member.members(member, stranger)
            assert await dht.service.value_store._store_at_peer(host, name, mine.raw)
            # Under that one key: a member's record under any number of names, however long, would fill the memory.
            for other in (name.replace(b"/psyche", b"/" + b"x" * 1000 + b"/psyche"), name[::-1], name.upper()):
                assert not await dht.service.value_store._store_at_peer(host, other, mine.raw)
            long = name[: name.rindex(b"/")] + b"/" + b"x" * 1000 + name[name.rindex(b"/") :]
            assert not await dht.service.value_store._store_at_peer(host, long, mine.raw)
            assert set(member.node._swarm.kademlia.service.value_store.store) == {name}
            assert member.node._swarm.kademlia.service.provider_store.get_providers(b"x" * 32) == []

    trio.run(scenario)


def test_members_on_one_local_network_find_each_other_without_bootstrap(tmp_path: Path) -> None:
    async def scenario() -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        one, other = Process(tmp_path / "a"), Process(tmp_path / "b")
        try:
            await one.start([], mdns=True)
            await other.start([], mdns=True)
            for process in (one, other):
                await process.members(one, other)
            await one.wait(PeerUp, slot=1)
            await other.wait(PeerUp, slot=0)
            assert [await process.stop() for process in (one, other)] == [0, 0]
        finally:
            for process in (one, other):
                if process.process.poll() is None:
                    process.process.kill()
                    process.process.wait()

    asyncio.run(scenario())


def test_mdns_goes_on_when_many_have_come_and_gone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[str] = []

    class Answered(lan.ServiceInfo):
        def load_from_cache(self, zeroconf: Zeroconf, now: float | None = None) -> bool:
            asked.append(self.name)
            return True

    monkeypatch.setattr(lan, "ServiceInfo", Answered)
    address = "/ip4/127.0.0.1/tcp/9"
    local = lan.LocalNetwork(RUN, NodeKey.generate().node_id, address, "127.0.0.1", lambda key, where: None)

    def says(name: str, change: ServiceStateChange) -> bool:
        asked.clear()
        local._changed(local._zeroconf, local._type, f"{name}.{local._type}", change)
        return bool(asked)

    added, updated, removed = ServiceStateChange.Added, ServiceStateChange.Updated, ServiceStateChange.Removed
    try:
        for number in range(2 * lan.MAX_SERVICES):
            assert says(str(number), added)
            says(str(number), removed)
        with caplog.at_level(logging.WARNING):
            assert [says(str(number), added) for number in range(lan.MAX_SERVICES + 2)][-3:] == [True, False, False]
        assert caplog.text.count("more are not listened to") == 1
        assert says("0", updated)
        says("0", removed)
        assert says("new", added)
    finally:
        local.close()


def test_without_any_route_the_address_of_an_interface_is_announced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_route(*_: object) -> None:
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    def address(text: str) -> SimpleNamespace:
        return SimpleNamespace(family=socket.AF_INET6 if ":" in text else socket.AF_INET, address=text)

    found = {
        "lo": [address("127.0.0.1"), address("::1")],
        "down": [address("192.0.2.7")],
        "eth0": [address("fe80::1%eth0"), address("2001:db8::5"), address("192.168.7.5")],
    }
    monkeypatch.setattr(socket.socket, "connect", no_route)
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    monkeypatch.setattr(psutil, "net_if_stats", lambda: {name: SimpleNamespace(isup=name != "down") for name in found})
    assert announced_host("0.0.0.0", []) == "192.168.7.5"
    assert announced_host("::", []) == "2001:db8::5"
    assert not caplog.text
    del found["eth0"]
    assert announced_host("0.0.0.0", []) == "127.0.0.1"
    assert "nobody else gets in" in caplog.text


def test_a_hint_is_tried_for_members_only_and_bounded(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with nodes(tmp_path, 1) as (here,):
            stranger = NodeKey.generate()
            hinted = here.node._swarm
            hinted.hint(stranger.public, "/ip4/127.0.0.1/tcp/9")
            assert stranger.public not in hinted._targets(set())
            entry = MemberEntry(slot=3, node_key=stranger.public.hex())
            await here.node.handle(SetMembers(members=[entry]))
            assert hinted._targets(set())[stranger.public] == ["/ip4/127.0.0.1/tcp/9"]
            for _ in range(swarm.MAX_HINTS + 10):
                hinted.hint(os.urandom(32), "/ip4/127.0.0.1/tcp/9")
            assert len(hinted._hints) == swarm.MAX_HINTS

    trio.run(scenario)


@pytest.mark.parametrize("part", ["pubsub", "gossip router", "Kademlia", "network", "listener"])
def test_a_dead_part_of_libp2p_ends_the_process_in_its_own_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.setattr(health, "CHECK_EVERY", 0.02)
    monkeypatch.setattr(health, "LISTEN_EVERY", 0.02)

    async def scenario() -> None:
        async with nodes(tmp_path, 1) as (here,):
            # It is well for a while.
            await trio.sleep(0.2)
            inside = here.node._swarm
            services = {
                "pubsub": inside.gossip.services["pubsub"],
                "gossip router": inside.gossip.services["gossip router"],
                "Kademlia": inside.kademlia.service,
                "network": inside._network,
            }
            if part in services:
                services[part].manager.cancel()
            else:
                for listener in inside._network.listeners.values():
                    await listener.close()
            with trio.fail_after(60):
                await trio.sleep_forever()

    with pytest.raises(BaseExceptionGroup) as caught:
        trio.run(scenario)
    died = caught.value.subgroup(PartDied)
    assert died is not None
    assert part in repr(died.exceptions)


def test_a_node_that_looks_at_itself_does_not_refuse_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "CHECK_EVERY", 0.02)
    monkeypatch.setattr(health, "LISTEN_EVERY", 0.02)

    async def scenario() -> None:
        async with nodes(tmp_path, 1) as (here,):

            def probes() -> int:
                return sum(one.count for one in here.node._reporter.refusals() if one.what == "probe")

            await here.until(lambda: probes() >= 3)
            assert {one.what for one in here.node._reporter.refusals()} == {"probe"}
            assert not any(isinstance(event, Rejected) for event in here.events)

    trio.run(scenario)


# Without any connection ---------------------------------------------------------------------------------------------


def test_it_goes_on_when_all_connections_were_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both peers are frozen until they count as gone and several attempts have failed; then they thaw."""
    monkeypatch.setattr(swarm, "PING_EVERY", 0.2)
    monkeypatch.setattr(swarm, "PING_SECONDS", 0.5)
    monkeypatch.setattr(swarm, "DIAL_SECONDS", 0.3)
    monkeypatch.setattr(swarm, "LONGEST_BACKOFF", 0.5)

    async def started() -> list[Process]:
        others = []
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            others.append(await Process(tmp_path / name).start(others[0].ready.multiaddrs if others else []))
        return others

    async def scenario(others: list[Process]) -> None:
        here = Here(tmp_path / "here", others[0].ready.multiaddrs)
        entries = [MemberEntry(slot=slot, node_key=other.key.public.hex()) for slot, other in enumerate(others)]
        async with here.node.running():
            await here.node.handle(SetMembers(members=entries))
            await here.until(lambda: PeerUp(slot=0) in here.events and PeerUp(slot=1) in here.events)
            for other in others:
                other.process.send_signal(signal.SIGSTOP)
            await here.until(lambda: not here.node._swarm.connected())
            await here.until(lambda: all(dial.failures >= 2 for dial in here.node._swarm._dials.values()))
            here.events.clear()
            for other in others:
                other.process.send_signal(signal.SIGCONT)
            await here.until(lambda: PeerUp(slot=0) in here.events and PeerUp(slot=1) in here.events)

    loop = asyncio.new_event_loop()
    others = loop.run_until_complete(started())
    try:
        for other in others:
            loop.run_until_complete(other.members(*others))
        trio.run(scenario, others)
    finally:
        for other in others:
            other.process.kill()
            other.process.wait()
            loop.run_until_complete(other.endpoint.close())
        loop.close()


def test_backoff_grows_to_its_bound_and_ends_when_somebody_is_back() -> None:
    attempt = swarm._Dial()

    async def waits() -> list[float]:
        found = []
        for _ in range(12):
            attempt.failed()
            found.append(attempt.due - trio.current_time())
        return found

    found = trio.run(waits)
    assert found[0] < 1.5
    assert max(found) <= swarm.LONGEST_BACKOFF * 1.2
    assert min(found[6:]) >= swarm.LONGEST_BACKOFF * 0.7
