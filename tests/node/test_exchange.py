"""The exchange over a real endpoint, a real store and the real codec; the network process is played by the test."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from mmap import mmap
from pathlib import Path

import numpy as np
import pytest
from node_stage import child, run_async, settle
from node_values import commitment

from optimizer.codec import Blob, Header, Update, encode, validate
from optimizer.layout import HEADER_BYTES, Layout
from psyche_node.ipc import Message, Ok
from psyche_node.network.messages import Fetched, FetchFailed, Forget, PeerDown, PeerUp, Publish, Rejected, Want
from psyche_node.network.store import BlobStore
from psyche_node.node.exchange import UpdateExchange, UpdateMissing
from psyche_node.node.journal import Journal, JournalReader

LAYOUT = Layout.build([("weight", (64, 64)), ("bias", (100,))], 8)
RUN = bytes(range(32))


def update(round: int = 3, member: int = 1, run: bytes = RUN, layout: Layout = LAYOUT) -> bytes:
    indices = np.arange(layout.topk, dtype=np.uint16) + np.zeros((layout.blocks, 1), np.uint16)
    return encode(Update(run, round, member, indices, np.zeros(indices.shape, np.bool_)), layout)


class Scene:
    def __init__(
        self, exchange: UpdateExchange, store: BlobStore, asked: list[Message], journal: JournalReader
    ) -> None:
        self.exchange, self.store, self.asked, self.journal = exchange, store, asked, journal

    def fetched(self, blob: bytes, round: int = 3, member: int = 1) -> bytes:
        """The network process has put the bytes into the store and says so."""
        digest, length = self.store.put(blob, round)
        self.exchange.on_event(
            Fetched(round=round, member=member, digest=digest.hex(), length=length, source="somebody")
        )
        return digest

    async def arrives(self, blob: bytes, round: int = 3, member: int = 1) -> bytes:
        """An update is committed to, wanted, and fetched."""
        digest = self.fetched(blob, round=99)  # nobody wants it yet: of no consequence
        self.store.drop(digest)
        await self.exchange.follow(round, [commitment(member, digest, LAYOUT.update_bytes)])
        assert self.wants()[-1] == (round, member, digest.hex())
        assert not self.exchange.settled(round, [member])
        self.fetched(blob, round, member)
        await settle(lambda: self.exchange.settled(round, [member]))
        return digest

    def wants(self) -> list[tuple[int, int, str]]:
        return [
            (message.round, want.member, want.digest)
            for message in self.asked
            if isinstance(message, Want)
            for want in message.wants
        ]

    def rejections(self) -> list[str]:
        return [line["reason"] for line in self.journal.read() if line["kind"] == "rejected"]


@contextlib.asynccontextmanager
async def scene(folder: Path) -> AsyncIterator[Scene]:
    asked: list[Message] = []

    def network(message: Message) -> Message:
        asked.append(message)
        return Ok()

    store, journal = BlobStore(folder / "blobs"), Journal(folder / "journal.jsonl")
    async with child(network) as (endpoint, _):
        exchange = UpdateExchange(endpoint, store, LAYOUT, RUN, journal)
        try:
            yield Scene(exchange, store, asked, JournalReader(folder / "journal.jsonl"))
        finally:
            await exchange.close()
            journal.close()


def test_valid_update_is_wanted_once_then_held_and_obtained(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            digest = await it.arrives(update())
            again = [commitment(1, digest, LAYOUT.update_bytes)]
            await it.exchange.follow(3, again)
            assert len(it.wants()) == 1
            assert it.exchange.held(3) == it.exchange.followed(3) == {1}
            assert it.exchange.held(2) == it.exchange.followed(2) == frozenset()
            paths = await it.exchange.obtain(3, {1}, 0.0)
            assert [path.read_bytes() for path in paths] == [update()]
            assert it.rejections() == []

    run_async(test())


def test_own_update_is_in_the_store_already_and_not_wanted(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            digest, length = it.store.put(update(), 3)
            await it.exchange.publish(3, 1, digest, length)
            await it.exchange.follow(3, [commitment(1, digest, length)])
            await settle(lambda: it.exchange.held(3) == {1})
            assert [type(message) for message in it.asked] == [Publish]

    run_async(test())


def test_an_update_that_cannot_be_is_refused(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            lie = commitment(1, bytes(32), LAYOUT.update_bytes)
            await it.exchange.follow(3, [lie])
            failed = FetchFailed(round=3, member=1, digest="00" * 32, reason="unreachable")
            it.exchange.on_event(failed)
            it.exchange.on_event(failed.model_copy(update={"final": True, "digest": "11" * 32}))
            assert not it.exchange.settled(3, [1])
            it.exchange.on_event(failed.model_copy(update={"final": True, "reason": "another length"}))
            assert it.exchange.settled(3, [1])
            assert it.exchange.held(3) == frozenset()
            with pytest.raises(UpdateMissing, match="another length"):
                await it.exchange.obtain(3, {1}, 60.0)

    run_async(test())


OTHER_LAYOUT = Layout.build([("weight", (64, 63)), ("bias", (100,))], 8)
HOSTILE = {
    "noise": (b"\x00" * LAYOUT.update_bytes, "begins with"),
    "code that is none": (update()[:HEADER_BYTES] + bytes(LAYOUT.update_bytes - HEADER_BYTES), "malformed"),
    "shorter": (update()[:-7], "bytes"),
    "longer": (update() + b"\x00", "bytes"),
    "empty": (b"", "bytes"),
    "another round": (update(round=2), "round 2"),
    "another member": (update(member=2), "member 2"),
    "another run": (update(run=bytes(32)), "run 00000000"),
    "another layout": (update(layout=OTHER_LAYOUT), "layout"),
}


@pytest.mark.parametrize(("blob", "reason"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_update_is_refused_for_good_with_its_reason(tmp_path: Path, blob: bytes, reason: str) -> None:
    assert OTHER_LAYOUT.update_bytes == LAYOUT.update_bytes

    async def test() -> None:
        async with scene(tmp_path) as it:
            await it.arrives(blob)
            it.fetched(blob)
            assert it.exchange.held(3) == frozenset()
            with pytest.raises(UpdateMissing, match="this node refused it"):
                await it.exchange.obtain(3, {1}, 1000.0)
            (said,) = it.rejections()
            assert reason in said

    run_async(test())


def test_update_of_wrong_committed_length_is_not_even_wanted(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            await it.exchange.follow(3, [commitment(1, bytes(32), LAYOUT.update_bytes + 1)])
            assert it.exchange.settled(3, [1])
            assert it.exchange.held(3) == frozenset()
            assert it.wants() == []
            assert "wrong length" in it.rejections()[0]

    run_async(test())


def test_copied_commitment_counts_for_its_author_alone(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            blob = update(member=1)
            digest, length = it.store.put(blob, 3)
            await it.exchange.follow(3, [commitment(1, digest, length), commitment(2, digest, length)])
            await settle(lambda: it.exchange.settled(3, [1, 2]))
            assert it.exchange.held(3) == {1}

    run_async(test())


def test_not_settled_while_something_committed_is_unknown_or_on_its_way(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            assert it.exchange.settled(3, [])
            assert not it.exchange.settled(3, [1])
            await it.exchange.follow(3, [commitment(1, bytes(32), LAYOUT.update_bytes)])
            it.exchange.on_event(FetchFailed(round=3, member=1, digest="00" * 32, reason="unreachable"))
            assert not it.exchange.settled(3, [1])

    run_async(test())


def test_fetched_twice_is_judged_once(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            blob = update(round=2)
            digest, length = it.store.put(blob, 9)
            it.store.drop(digest)
            await it.exchange.follow(3, [commitment(1, digest, length)])
            it.fetched(blob)
            it.fetched(blob)
            await settle(lambda: not it.exchange._tasks)
            assert len(it.rejections()) == 1

    run_async(test())


def test_obtain_waits_for_what_is_on_its_way_and_gives_member_order(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            blobs = {member: update(member=member) for member in (2, 0, 1)}
            for member, blob in blobs.items():
                await it.arrives(blob, member=member)
            paths = await it.exchange.obtain(3, {2, 1, 0}, 1000.0)
            assert [path.read_bytes() for path in paths] == [blobs[0], blobs[1], blobs[2]]
            assert await it.exchange.obtain(4, frozenset(), 0.0) == []

    run_async(test())


def test_obtain_gives_up_and_names_what_is_missing(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            await it.arrives(update())
            await it.exchange.follow(3, [commitment(2, bytes(32), LAYOUT.update_bytes)])
            with pytest.raises(UpdateMissing, match=r"round 3: no peer served the update of member\(s\) \[2\]"):
                await it.exchange.obtain(3, {1, 2}, 0.01)

    run_async(test())


def test_time_without_any_connection_does_not_count(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            await it.exchange.follow(3, [commitment(2, bytes(32), LAYOUT.update_bytes)])
            it.exchange.on_event(PeerUp(slot=2))
            it.exchange.on_event(PeerUp(slot=5))
            it.exchange.on_event(PeerDown(slot=2))
            with pytest.raises(UpdateMissing):
                await it.exchange.obtain(3, {2}, 0.0)
            it.exchange.on_event(PeerDown(slot=5))
            # Not even time to look: yet it waits, until somebody is back, and then looks no longer.
            waiting = asyncio.create_task(it.exchange.obtain(3, {2}, 0.0))
            await it.arrives(update())
            assert not waiting.done()
            it.exchange.on_event(PeerUp(slot=5))
            with pytest.raises(UpdateMissing):
                await waiting
            # What comes in that time is taken.
            it.exchange.on_event(PeerDown(slot=5))
            waiting = asyncio.create_task(it.exchange.obtain(4, {2}, 0.0))
            await it.arrives(update(round=4, member=2), round=4, member=2)
            assert len(await waiting) == 1

    run_async(test())


def test_forgotten_rounds_are_gone_and_the_network_is_told(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            await it.arrives(update(round=3), round=3)
            await it.arrives(update(round=4), round=4)
            await it.exchange.forget(4)
            assert it.asked[-1] == Forget(before_round=4)
            assert it.exchange.held(3) == frozenset()
            assert it.exchange.held(4) == {1}

    run_async(test())


def test_refusals_of_the_network_are_journalled(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            it.exchange.on_event(Rejected(what="piece", peer="12D3Koo", member=2, reason="not the piece committed to"))
            assert it.rejections() == ["not the piece committed to"]

    run_async(test())


def test_an_update_that_left_the_store_is_not_handed_out(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            it.store.drop(await it.arrives(update()))
            with pytest.raises(UpdateMissing, match="round 3: the validated update of member 1 left the store"):
                await it.exchange.obtain(3, {1}, 5.0)

    run_async(test())


def test_a_failure_that_is_reported_late_does_not_undo_what_has_been_judged(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            digest = await it.arrives(update())
            it.exchange.on_event(
                FetchFailed(round=3, member=1, digest=digest.hex(), reason="nobody has it", final=True)
            )
            assert it.rejections() == []
            assert len(await it.exchange.obtain(3, {1}, 5.0)) == 1

    run_async(test())


def test_an_update_is_not_read_into_memory_to_be_validated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The updates of all members come at once, and each may have gigabytes."""
    looked_at: list[Blob] = []

    def looking(blob: Blob, layout: Layout) -> Header:
        looked_at.append(blob)
        return validate(blob, layout)

    async def test() -> None:
        async with scene(tmp_path) as it:
            monkeypatch.setattr("psyche_node.node.exchange.validate", looking)
            await it.arrives(update())
            assert it.exchange.held(3) == {1}

    run_async(test())
    assert [type(blob.obj) for blob in looked_at if isinstance(blob, memoryview)] == [mmap]
