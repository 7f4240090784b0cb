"""How often a node uploads an update when all members pass it on: `python -m benchmarks.network_fanout`.

Nodes with everything but libp2p (gRPC with mutual TLS on loopback, stores on disk, the real choice of sources), all in
one process, so seconds say little and bytes say all. For 4, 8, 16 and 32 nodes: one update that all others want, then
one of every node at the same time. The baseline, in the same run, is that everybody asks the author. Exit status 1
when a node uploads one update more often than log2 of the nodes says.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("GRPC_VERBOSITY", "NONE")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "network"))

import trio
from exchange_nodes import ExchangeNode, nodes

from psyche_node.network.fanout import Tree

WARM_UP = 1000


class Star(Tree):
    """The tree of the baseline: everybody's parent is the author."""

    def ancestors(self, key: bytes) -> list[bytes]:
        return [self.order[0]] if key != self.order[0] else []

    def children(self, key: bytes) -> list[bytes]:
        return []


@dataclass(frozen=True)
class Row:
    """What one number of nodes took. Copies are bytes of pieces uploaded, over the bytes of an update."""

    nodes: int
    way: str
    one_author: float
    """Copies that the author of a single update uploaded."""
    one_busiest: float
    one_seconds: float
    all_busiest: float
    """Copies that the busiest node uploaded, all authors' updates together, when every node had one."""
    all_mean: float
    all_seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--bytes", type=int, default=3_000_000, help="of an update")
    parser.add_argument("--repeat", type=int, default=3, help="single updates; the medians are printed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    rows = []
    for count in options.nodes:
        for way in ("author", "tree"):
            rows.append(trio.run(measure, count, way, options.bytes, options.repeat, options.seed))
            _print(rows[-1], first=len(rows) == 1)
    if options.json:
        figures = {
            "rows": [asdict(row) for row in rows],
            "update_bytes": options.bytes,
            "seed": options.seed,
            "machine": platform.platform(),
            "cores": os.cpu_count(),
        }
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if all(row.one_busiest <= math.log2(row.nodes) for row in rows if row.way == "tree") else 1


async def measure(count: int, way: str, size: int, repeat: int, seed: int) -> Row:
    """Measure one number of nodes."""
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        async with nodes(Path(folder), count) as made:
            if way == "author":
                for node in made:
                    node.fetcher.tree = Star
            # Connections are made beforehand: they cost more than a small update.
            await spread(made, made, WARM_UP, 0, generator)
            single, seconds = [], []
            for number in range(repeat):
                author = generator.choice(made)
                copies, took = await spread(made, [author], size, number + 1, generator)
                single.append((copies[made.index(author)], max(copies)))
                seconds.append(took)
            everyone, all_took = await spread(made, made, size, repeat + 1, generator)
    return Row(
        count,
        way,
        statistics.median(author for author, _ in single),
        statistics.median(busiest for _, busiest in single),
        statistics.median(seconds),
        max(everyone),
        statistics.mean(everyone),
        all_took,
    )


async def spread(
    made: list[ExchangeNode], authors: list[ExchangeNode], size: int, round: int, generator: random.Random
) -> tuple[list[float], float]:
    """Let every author publish and everybody else want it. Returns the copies that each node uploaded, and seconds."""
    before = [node.uploaded() for node in made]
    started = time.perf_counter()
    digests = {}
    for author in authors:
        digests[made.index(author)] = author.put(generator.randbytes(size), round)
    for node in made:
        node.announcements.reached(round)
        for member, digest in digests.items():
            if made[member] is not node:
                node.fetcher.want(round, member, digest, size)
    for node in made:
        for member, digest in digests.items():
            if made[member] is not node:
                await node.fetched(digest, 600)
    took = time.perf_counter() - started
    copies = [(node.uploaded() - sent) / size for node, sent in zip(made, before, strict=True)]
    for node in made:
        node.events.clear()
        node.store.forget(round + 1)
    return copies, took


def _print(row: Row, *, first: bool) -> None:
    if first:
        print(f"{'':<14}one update of one author: copies      one update of every author: copies uploaded")
        print(
            f"{'nodes':<6}{'from':<8}{'author':>8}{'busiest':>10}{'seconds':>10}{'busiest':>18}{'mean':>8}{'seconds':>10}"
        )
    print(
        f"{row.nodes:<6}{row.way:<8}{row.one_author:>8.2f}{row.one_busiest:>10.2f}{row.one_seconds:>10.2f}"
        f"{row.all_busiest:>18.2f}{row.all_mean:>8.2f}{row.all_seconds:>10.2f}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
