"""A node in a process of its own, to be killed: fetches one blob from one other node.

Arguments: folder, seed of its key, the other's node key, address, hash of its certificate, digest, length.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import trio
from exchange_nodes import RUN, ExchangeNode

from psyche_node.identity import NodeKey
from psyche_node.network.messages import Kind
from psyche_node.network.statements import NodeRecord


async def fetch(folder: str, seed: str, other: str, address: str, leaf: str, digest: str, length: str) -> None:
    """Print how many bytes of pieces came, and end when the blob is here."""
    node = ExchangeNode(Path(folder), NodeKey(bytes.fromhex(seed)))
    key = bytes.fromhex(other)
    node.directory.set_members({0: key, 1: node.key.public})
    now = time.time_ns() // 1_000_000
    node.directory.add(NodeRecord(RUN, key, now, ("/ip4/127.0.0.1/tcp/1",), address, bytes.fromhex(leaf), 0), b"")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.fetcher.run)
        await trio.testing.wait_all_tasks_blocked()
        node.fetcher.want(1, 0, bytes.fromhex(digest), int(length), Kind.MODEL)
        await node.fetched(bytes.fromhex(digest))
        nursery.cancel_scope.cancel()
    print(node.traffic.blob_received)
    node.close()


if __name__ == "__main__":
    trio.run(fetch, *sys.argv[1:])
