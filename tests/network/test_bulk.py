"""Pieces over bulk connections: nodes that use them, and nodes that fall back to gRPC."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from exchange_nodes import ExchangeNode, in_trio, introduce, nodes

from psyche_node.network.blobs import PIECE_BYTES
from psyche_node.network.certificates import issue
from psyche_node.network.links import CallFailed
from psyche_node.network.messages import Why
from psyche_node.network.wire import node_pb2 as wire

pytestmark = pytest.mark.timeout(240)
BLOB = 6 * PIECE_BYTES + 77


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that no event tells of."""
    with trio.fail_after(60):
        while not condition():
            await trio.sleep(0.01)


async def connected(node: ExchangeNode, to: ExchangeNode) -> None:
    """Have ``node`` make a bulk connection, as its first large download does."""
    node.lanes.take(to.key.public, worth=True)
    await until(lambda: node.lanes._idle.get(to.key.public))


async def brought(node: ExchangeNode, author: ExchangeNode, round: int, length: int = BLOB) -> bytes:
    """Let ``node`` fetch a new blob of ``author``. Returns its bytes, as they are on the disk of ``node``."""
    data = os.urandom(length)
    digest = author.put(data, round)
    node.fetcher.want(round, 0, digest, len(data))
    await node.fetched(digest)
    path = node.store.path(digest)
    assert path is not None
    assert path.read_bytes() == data
    return data


@in_trio
async def test_the_first_blob_comes_by_grpc_or_bulk_and_the_next_ones_by_bulk_alone(tmp_path: Path) -> None:
    async with nodes(tmp_path, 2) as (author, node):
        await brought(node, author, 1)
        assert node.traffic.blob_received == BLOB
        await until(lambda: node.lanes._idle)
        for round in (2, 3):
            before = node.traffic.bulk_received
            await brought(node, author, round)
            assert node.traffic.bulk_received - before == BLOB
        assert node.traffic.bulk_received == author.traffic.bulk_sent
        assert not author.rejected()
        assert not node.rejected()


@in_trio
@pytest.mark.parametrize("length", [1, PIECE_BYTES, PIECE_BYTES + 1, 70 * PIECE_BYTES])
async def test_blobs_of_any_length_come_by_bulk(tmp_path: Path, length: int) -> None:
    async with nodes(tmp_path, 2) as (author, node):
        await connected(node, author)
        await brought(node, author, 1, length)
        assert node.traffic.bulk_received == length


@in_trio
async def test_small_blobs_make_no_connection(tmp_path: Path) -> None:
    async with nodes(tmp_path, 2) as (author, node):
        await brought(node, author, 1, PIECE_BYTES)
        assert not node.lanes._opening
        assert not node.lanes._idle
        assert node.traffic.bulk_received == 0


def nowhere() -> str:
    """Return an address at which nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{sock.getsockname()[1]}"


@in_trio
async def test_a_bulk_port_that_is_not_reached_costs_nothing_and_is_left_alone(tmp_path: Path) -> None:
    async with nodes(tmp_path, 2) as made:
        author, node = made
        author.bulk_address = nowhere()
        introduce(made)
        await brought(node, author, 1)
        await until(lambda: node.lanes._failed)
        await brought(node, author, 2)
        assert not node.lanes._opening
        assert node.traffic.bulk_received == 0
        assert not node.rejected()
        # Another address is another chance.
        author.bulk_address = f"127.0.0.1:{author.bulk.port}"
        introduce(made)
        await connected(node, author)
        await brought(node, author, 3)
        assert node.traffic.bulk_received == BLOB


@in_trio
async def test_what_a_lost_connection_did_not_bring_comes_by_grpc(tmp_path: Path) -> None:
    async with nodes(tmp_path, 2) as (author, node):
        await connected(node, author)
        pieces = author.holdings.pieces

        def breaks(digest: bytes, run: range):  # type: ignore[no-untyped-def]
            for index, piece in zip(run, pieces(digest, run), strict=False):
                if index == 2:
                    for secure in list(author.bulk._open):
                        secure.end()
                yield piece

        author.holdings.pieces = breaks  # type: ignore[method-assign]
        await brought(node, author, 1)
        assert 0 < node.traffic.bulk_received < BLOB
        assert node.lanes._failed
        assert not node.rejected()


@in_trio
async def test_a_tampered_piece_bans_its_sender_over_bulk_as_over_grpc(tmp_path: Path) -> None:
    data = os.urandom(BLOB)
    async with nodes(tmp_path, 3, {1: ["tamper"]}) as made:
        liar, node = made[1], made[2]
        await connected(node, liar)
        liar.store.put(data, 1)
        made[0].put(data, 1)
        node.fetcher.want(1, 1, made[0].put(data, 1), len(data))
        event = await node.fetched(made[0].put(data, 1))
        assert event.source == made[0].key.node_id
        assert node.directory.banned(liar.key.public)
        assert [(e.what, e.why) for e in node.rejected()] == [("piece", Why.WRONG_BYTES)]


@in_trio
async def test_a_server_with_another_certificate_than_the_record_says_is_not_used(tmp_path: Path) -> None:
    async with nodes(tmp_path, 2) as made:
        author, node = made
        record = replace(author.record, tls_leaf=issue(author.key).der_hash)
        node.directory.add(replace(record, seq=record.seq + 1), b"")
        assert node.lanes.take(author.key.public, worth=True) is None
        await node.event(lambda event: getattr(event, "why", None) is Why.IDENTITY)
        assert not node.lanes._idle


@in_trio
async def test_another_nodes_server_is_not_used(tmp_path: Path) -> None:
    async with nodes(tmp_path, 3) as made:
        author, other, node = made
        record = replace(author.record, bulk_address=other.bulk_address)
        node.directory.add(replace(record, seq=record.seq + 1), b"")
        assert node.lanes.take(author.key.public, worth=True) is None
        await node.event(lambda event: getattr(event, "why", None) is Why.IDENTITY)
        assert not node.lanes._idle


@in_trio
async def test_idle_connections_go_with_membership_and_with_the_record(tmp_path: Path) -> None:
    async with nodes(tmp_path, 2) as made:
        author, node = made
        await connected(node, author)
        (_, connection) = node.lanes._idle[author.key.public][0]
        author.leaf = issue(author.key)
        introduce(made)
        assert node.lanes.take(author.key.public, worth=False) is None
        assert connection.ended
        await connected(node, author)
        (_, connection) = node.lanes._idle[author.key.public][0]
        node.lanes.retain(())
        assert connection.ended


@in_trio
async def test_a_node_that_is_no_member_any_more_is_refused_at_its_next_request(tmp_path: Path) -> None:
    async with nodes(tmp_path, 2) as (author, node):
        data = os.urandom(BLOB)
        digest = author.put(data, 1)
        await connected(node, author)
        author.directory.set_members({0: author.key.public})
        pieces = node.lanes.lane(author.key.public, BLOB).fetch(digest, 0, 1, 60.0, wire.UPDATE)
        with pytest.raises(CallFailed, match="only members"):
            await trio.to_thread.run_sync(lambda: list(pieces))
        event = await author.event(lambda event: getattr(event, "what", None) == "call")
        assert event.why is Why.NOT_A_MEMBER  # type: ignore[attr-defined]
        assert node.traffic.bulk_received == 0
