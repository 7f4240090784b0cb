"""Pieces over bulk connections: nodes that use them, and nodes that fall back to gRPC."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from exchange_nodes import ExchangeNode, in_trio, nodes

from psyche_node.network.store import PIECE_BYTES

pytestmark = pytest.mark.timeout(120)
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
