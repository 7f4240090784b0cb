"""How announcements spread: directly, over libp2p, by gossip; and what a member that floods can make another one do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
from libp2p.abc import INetStream
from libp2p.io.exceptions import IOException
from libp2p.stream_muxer.exceptions import MuxedStreamError
from network_driver import RUN
from network_here import Here, nodes

from psyche_node.identity import NodeKey
from psyche_node.network import direct, spread, statements, throttle
from psyche_node.network.announcements import ROUNDS_AHEAD, Announcements, Verdict
from psyche_node.network.direct import PROTOCOL
from psyche_node.network.directory import Directory
from psyche_node.network.host import peer_of
from psyche_node.network.links import CallFailed, Cause
from psyche_node.network.messages import Announced, PeerUp, Publish, Rejected, Want, WantEntry
from psyche_node.network.statements import Announcement
from psyche_node.network.store import BlobStore
from psyche_node.network.throttle import Throttle
from psyche_node.network.wire import node_pb2 as wire

pytestmark = pytest.mark.timeout(240)


async def meet(*here: Here) -> None:
    for one in here:
        await one.members(*here)
    for one in here:
        await one.hears(*(PeerUp(slot=slot) for slot, other in enumerate(here) if other is not one))
        await one.until(lambda one=one: not one.node._directory.unknown_members())  # type: ignore[misc]


async def publish(author: Here, member: int, round: int) -> Announced:
    digest, length = BlobStore(Path(author.node._configure.folder) / "blobs").put(b"update %d" % round, round)
    await author.node.handle(Publish(round=round, member=member, digest=digest.hex(), length=length))
    return Announced(round=round, member=member, digest=digest.hex(), length=length)


class Gossiped:
    """What a node gave to gossip."""

    def __init__(self, here: Here) -> None:
        self.raw: list[bytes] = []
        self._really = here.node._swarm.gossip.announcement
        here.node._swarm.gossip.announcement = self  # type: ignore[assignment]

    async def __call__(self, raw: bytes) -> None:
        self.raw.append(raw)
        await self._really(raw)


def test_each_way_is_taken_when_the_cheaper_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "GOSSIP_AFTER", (0.0, 0.0))

    async def scenario() -> None:
        async with nodes(tmp_path, 3) as (author, second, third):
            await meet(author, second, third)
            gossiped = Gossiped(author)
            told: list[bytes] = []
            tell, call = author.node._swarm.direct.tell, author.node._links.call

            async def telling(key: bytes, announcements: list[bytes]) -> bool:
                told.append(key)
                return await tell(key, announcements)

            author.node._swarm.direct.tell = telling  # type: ignore[method-assign]

            heard = await publish(author, 0, 1)
            for other in (second, third):
                await other.hears(heard)
            assert not told

            # One of them cannot be reached by gRPC.
            def refuses(peer: bytes, *arguments: Any) -> Any:
                if peer == third.key.public:
                    raise CallFailed(Cause.UNREACHABLE, "behind a NAT")
                return call(peer, *arguments)

            author.node._links.call = refuses  # type: ignore[method-assign]
            heard = await publish(author, 0, 2)
            for other in (second, third):
                await other.hears(heard)
            assert told == [third.key.public]
            assert not gossiped.raw

            # Nor over libp2p: gossip goes round. It may lose one.
            async def deaf(key: bytes, announcements: list[bytes]) -> bool:
                return False

            author.node._swarm.direct.tell = deaf  # type: ignore[method-assign]
            monkeypatch.setattr(spread, "MISSES", 1000)
            with trio.fail_after(90):
                for number in range(3, 1000):
                    heard = await publish(author, 0, number)
                    await second.hears(heard)
                    with trio.move_on_after(0.5) as missed:
                        await third.hears(heard)
                    if not missed.cancelled_caught:
                        break
            assert gossiped.raw
            assert heard in third.events

    trio.run(scenario)


def test_an_announcement_that_was_lost_is_healed_from_chain_and_peers(tmp_path: Path) -> None:
    """It reaches one of two. The other knows from the chain that it exists, asks around and hears it."""

    async def scenario() -> None:
        async with nodes(tmp_path, 3) as (author, second, third):
            await meet(author, second, third)

            async def lose(raw: bytes) -> None:
                second.node.intake.gossip_announcement(raw, author.key.public)

            author.node._spreader.spread = lose  # type: ignore[method-assign]
            heard = await publish(author, 0, 4)
            await second.hears(heard)
            assert heard not in third.events
            # Only the second one may be asked.
            third.node._directory.ban(author.key.public)
            want = WantEntry(member=0, digest=heard.digest, length=heard.length)
            await third.node.handle(Want(round=4, wants=[want]))
            await third.hears(heard)

    trio.run(scenario)


def test_no_gossip_is_made_for_the_sake_of_the_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "GOSSIP_AFTER", (0.0, 0.0))

    async def scenario() -> None:
        async with nodes(tmp_path, 2) as (author, second):
            await meet(author, second)
            gossiped = Gossiped(author)
            spreader = author.node._spreader
            dead = NodeKey.generate().public
            author.node._directory.set_members({0: author.key.public, 1: second.key.public, 2: dead})
            for number in range(spread.MISSES + 2):
                announcement = Announcement(RUN, number, author.key.public, bytes(32), 1).sign(author.key)
                await spreader.spread(announcement)
            assert len(gossiped.raw) == spread.MISSES - 1
            # Who has left the run is forgotten.
            author.node._directory.set_members({0: author.key.public, 1: second.key.public})
            await spreader.spread(announcement)
            assert dead not in spreader._missed
            assert len(gossiped.raw) == spread.MISSES - 1

    trio.run(scenario)


def test_a_flooding_member_is_throttled_and_others_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sends thousands of statements, good ones and bad ones, in all three ways; few of them are verified."""
    verified: list[bytes] = []

    def verify(key: bytes, message: bytes, signature: bytes) -> bool:
        verified.append(key)
        return real(key, message, signature)

    real = statements.verify

    async def scenario() -> None:
        async with nodes(tmp_path, 3) as (victim, flooder, honest):
            await meet(victim, flooder, honest)
            monkeypatch.setattr(statements, "verify", verify)
            started = trio.current_time()
            key = flooder.key
            good = [Announcement(RUN, n % 8, key.public, n.to_bytes(32), 1).sign(key) for n in range(960)]
            bad = [raw[:-1] + bytes([raw[-1] ^ 1]) for raw in good]
            sent = 0
            direct, links = flooder.node._swarm.direct, flooder.node._links
            for at in range(0, len(good), 64):
                for batch in (bad[at : at + 64], good[at : at + 64]):
                    request = wire.AnnounceRequest(announcements=batch)
                    await trio.to_thread.run_sync(
                        links.call, victim.key.public, "Announce", request, wire.AnnounceReply, 60.0
                    )
                    await direct.tell(victim.key.public, batch)
                    sent += 2 * len(batch)
            for raw in bad[:200]:
                await flooder.node._swarm.gossip._pubsub.publish(flooder.node._swarm.gossip._announcements, raw)
                sent += 1
            # One bucket full of refusals, and what has been refilled since; by gossip the third node gets some, too.
            cost = 1.0 + throttle.REFUSED_COSTS
            refilled = (trio.current_time() - started) * throttle.STATEMENTS_PER_SECOND
            assert sent > 4000
            assert len(verified) <= 2 * ((throttle.STATEMENTS_AT_ONCE + refilled) / cost + ROUNDS_AHEAD + 2)
            await victim.until(
                lambda: any(isinstance(e, Rejected) and e.what == "flood" and e.member == 1 for e in victim.events)
            )
            heard = await publish(honest, 2, 1)
            await victim.hears(heard)
            # The flooder's own excess, and nobody else's, was dropped.
            flooded = [e for e in victim.events + honest.events if isinstance(e, Rejected) and e.what == "flood"]
            assert {event.member for event in flooded} == {1}

    trio.run(scenario)


def test_who_is_not_a_member_tells_nothing_over_libp2p(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with nodes(tmp_path, 2) as (member, stranger):
            await member.members(member)
            await stranger.members(member, stranger)
            await stranger.hears(PeerUp(slot=0))
            raw = Announcement(RUN, 1, stranger.key.public, bytes(32), 1).sign(stranger.key)
            tell = stranger.node._swarm.direct.tell
            assert not await tell(member.key.public, [raw])
            await member.members(member, stranger)
            assert await tell(member.key.public, [raw])
            await member.hears(Announced(round=1, member=1, digest=bytes(32).hex(), length=1))
            # Frames that lie about their length, or are none, cost their sender the stream.
            host = stranger.node._swarm._host
            for frame in (b"\xff\xff\xff\xff", b"\0\0\0\x02\xff\xff"):
                stream = await host.new_stream(peer_of(member.key.public), [PROTOCOL])
                await stream.write(frame)
                assert await _answer(stream) == b""
            assert await tell(member.key.public, [raw])
            # Of the places for it one peer has two.
            for _ in range(direct.MAX_SERVED_PER_PEER):
                stream = await host.new_stream(peer_of(member.key.public), [PROTOCOL])
                await stream.write(b"\0")
            places = member.node._swarm.direct._serving
            await member.until(lambda: places.count(stranger.key.public) == direct.MAX_SERVED_PER_PEER)
            assert not await tell(member.key.public, [raw])

    trio.run(scenario)


async def _answer(stream: INetStream) -> bytes:
    """Return what comes before the stream ends or is reset."""
    with trio.fail_after(60):
        try:
            return await stream.read(4)
        except (MuxedStreamError, IOException):
            return b""


def test_a_contradiction_is_charged_to_its_author_and_not_to_who_passed_it_on(tmp_path: Path) -> None:
    author, forwarder = NodeKey.generate(), NodeKey.generate()

    async def scenario() -> None:
        async with nodes(tmp_path, 1) as (here,):
            node = here.node
            node._directory.set_members({0: author.public, 1: forwarder.public})
            for number in range(100):
                raw = Announcement(RUN, 1, author.public, number.to_bytes(32), 1).sign(author)
                assert node.intake.gossip_announcement(raw, forwarder.public) == (number == 0)
            assert node.intake.allows(forwarder.public)
            assert not node.intake.allows(author.public)
            # What nobody signed, or somebody with a key of no value, is the sender's.
            for _ in range(50):
                stranger = NodeKey.generate()
                node.intake.gossip_announcement(b"rubbish", forwarder.public)
                node.intake.gossip_announcement(
                    Announcement(RUN, 1, stranger.public, bytes(32), 1).sign(stranger), forwarder.public
                )
            assert not node.intake.allows(forwarder.public)

    trio.run(scenario)


def test_a_statement_that_was_taken_is_not_verified_again(monkeypatch: pytest.MonkeyPatch) -> None:
    key = NodeKey.generate()
    directory = Directory(bytes(32))
    directory.set_members({5: key.public})
    known = Announcements(RUN, directory)
    raw = Announcement(RUN, 1, key.public, bytes(32), 1).sign(key)
    assert known.offer(raw).verdict is Verdict.NEW
    with monkeypatch.context() as patch:
        patch.setattr(statements, "verify", None)
        again = known.offer(raw)
        assert (again.verdict, again.slot) == (Verdict.KNOWN, 5)
        # Membership is asked each time.
        directory.set_members({})
        assert known.offer(raw).verdict is Verdict.REFUSED
    known.forget(2)
    directory.set_members({5: key.public})
    assert known.offer(raw).verdict is Verdict.OUTSIDE
    assert not known._taken


def test_the_bucket() -> None:
    now = 50.0
    bucket = Throttle(rate=2.0, burst=10.0, clock=lambda: now)
    assert [bucket.allows(b"a") for _ in range(12)] == [True] * 10 + [False] * 2
    assert bucket.allows(b"b")
    now += 1.0
    assert [bucket.allows(b"a") for _ in range(3)] == [True, True, False]
    # A refusal costs more than a statement, and can be owed up to one bucket.
    for _ in range(5):
        bucket.refused(b"b")
    now += 4.0
    assert not bucket.allows(b"b")
    now += 2.0
    assert bucket.allows(b"b")
    now += 100.0
    assert sum(bucket.allows(b"b") for _ in range(50)) == 10
    for number in range(throttle.MAX_PEERS + 100):
        bucket.allows(str(number))
    assert len(bucket._buckets) == throttle.MAX_PEERS
