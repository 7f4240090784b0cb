"""Who is served first: uploads of one peer, uploads that wait for pieces, and downloads that wait for a slot."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import trio
import trio.testing
from exchange_nodes import ExchangeNode, Gate, held, in_trio, nodes, until

from psyche_node.network.blobs import PIECE_BYTES, Manifest, piece_digest
from psyche_node.network.guard import MAX_STREAMS
from psyche_node.network.holdings import Holdings
from psyche_node.network.links import CallFailed, Cause
from psyche_node.network.messages import Fetched, FetchFailed, Kind
from psyche_node.network.reader import Reader
from psyche_node.network.store import BlobStore
from psyche_node.network.uploads import SLACK_BYTES

pytestmark = pytest.mark.timeout(240)


@in_trio
async def test_a_source_that_takes_one_call_at_a_time_is_no_failure(tmp_path: Path) -> None:
    data = os.urandom(32 * PIECE_BYTES)
    async with nodes(tmp_path, 2) as made:
        made[0].service.pieces._uploads._streams._per_peer = 1
        digest = made[0].put(data, 1)
        made[1].fetcher.want(1, 0, digest, len(data))
        await made[1].fetched(digest)
        assert not [event for event in made[1].events if isinstance(event, FetchFailed)]
        assert made[0].uploaded() == len(data)


def take(node: ExchangeNode, source: ExchangeNode, digest: bytes, first: int, count: int) -> int:
    return sum(len(piece) for piece in node.links.fetch(source.key.public, digest, first, count, 60.0))


@in_trio
async def test_a_peer_that_fetches_the_same_again_and_again_is_stopped(
    tmp_path: Path,
) -> None:
    async with nodes(tmp_path, 3) as made:
        digest = made[0].put(os.urandom(16 * PIECE_BYTES), 1)
        taken, cause = 0, None
        while cause is None and taken < 1 << 28:
            try:
                taken += await trio.to_thread.run_sync(take, made[1], made[0], digest, 0, 16)
            except CallFailed as error:
                cause = error.cause
        assert cause is Cause.BUSY
        assert taken == 2 * 16 * PIECE_BYTES + SLACK_BYTES
        assert await trio.to_thread.run_sync(take, made[2], made[0], digest, 0, 16) == 16 * PIECE_BYTES


def test_every_upload_waits_for_pieces_that_are_about_to_come(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    data = os.urandom(3 * PIECE_BYTES)
    manifest = Manifest(
        len(data), tuple(piece_digest(data[at : at + PIECE_BYTES]) for at in range(0, len(data), PIECE_BYTES))
    )
    holdings = Holdings(Reader(store))
    partial = holdings.begin(store.resume(manifest, 0))
    assert partial.write(0, data[:PIECE_BYTES])
    streams = [holdings.pieces(manifest.digest, range(3)) for _ in range(MAX_STREAMS)]
    assert {next(stream) for stream in streams} == {data[:PIECE_BYTES]}
    waiting = threading.Semaphore(0)
    holds = partial.holds

    def told(index: int, seconds: float = 0.0) -> bool:
        if seconds:
            waiting.release()
        return holds(index, 60.0 if seconds else 0.0)

    partial.holds = told  # type: ignore[method-assign]
    results: list[int] = []
    threads = [
        threading.Thread(target=lambda stream=stream: results.append(sum(map(len, stream)))) for stream in streams
    ]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert waiting.acquire(timeout=60)
    for index in (1, 2):
        assert partial.write(index, data[index * PIECE_BYTES : (index + 1) * PIECE_BYTES])
    for thread in threads:
        thread.join(60)
    assert results == [2 * PIECE_BYTES] * MAX_STREAMS
    partial.finish()
    holdings.end(partial)
    assert list(holdings.pieces(manifest.digest, range(2, 3))) == [data[2 * PIECE_BYTES :]]


@in_trio
async def test_updates_that_wait_for_a_slot_go_by_round(tmp_path: Path) -> None:
    """One slot: the oldest round has it, since it was wanted first."""
    async with nodes(tmp_path, 2) as made:
        made[1].fetcher._attempts._slots._free = 1
        made[1].announcements.reached(5)
        gate = Gate(made[0].holdings, 0)
        digests = {}
        for round in (3, 4, 5):
            digests[round] = digest = made[0].put(os.urandom(1000), round)
            made[1].fetcher.want(round, 0, digest, 1000)
            await until(lambda digest=digest: made[1].fetcher._wanted(digest)[0].running)  # type: ignore[misc]
        gate.open()
        for digest in digests.values():
            await made[1].fetched(digest)
        order = [event.round for event in made[1].events if isinstance(event, Fetched)]
        assert order == [3, 5, 4]


@in_trio
async def test_an_update_does_not_wait_for_a_model(tmp_path: Path) -> None:
    async with nodes(tmp_path, 2) as made:
        made[1].fetcher._attempts._slots._free = made[1].fetcher._attempts._other_slots._free = 1
        gate = Gate(made[0].holdings, 1)
        model = made[0].put(os.urandom(2 * PIECE_BYTES), 1, Kind.MODEL)
        made[1].fetcher.want(1, 0, model, 2 * PIECE_BYTES, Kind.MODEL)
        await until(lambda: held(made[1], model) == 1)
        update = made[0].put(os.urandom(1000), 1)
        made[1].fetcher.want(1, 0, update, 1000)
        await made[1].fetched(update)
        assert held(made[1], model) == 1
        gate.open()
        await made[1].fetched(model)
