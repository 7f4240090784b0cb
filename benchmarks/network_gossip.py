"""How fast announcements reach everybody when all nodes announce at once: ``python -m benchmarks.network_gossip``.

Each node is a whole one (libp2p host, gossip, gRPC server and channels); several share a process, because importing
libp2p costs 93 MB. Start-up and connecting do not count. Bursts: by gossip alone, as a baseline; and twice as nodes do
announce. What a node has not heard after two seconds it wants, as it would because of the chain, and so asks around.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import trio

from psyche_node.ipc import Message
from psyche_node.network import swarm
from psyche_node.network.blobs import blob_digest
from psyche_node.network.messages import Announced, Configure, MemberEntry, Publish, SetMembers, Want, WantEntry
from psyche_node.network.node import NetworkNode
from psyche_node.network.statements import Announcement
from psyche_node.network.store import BlobStore

RUN = bytes(range(32))
LIMIT = 5.0
ASK_AFTER = 2.0


class Host:
    """One node of this process and when it heard of what."""

    def __init__(self, folder: Path, slot: int, bootstrap: list[str]) -> None:
        self.slot, self.heard = slot, dict[tuple[int, int], float]()
        self.store = BlobStore(folder / "blobs")
        self.node = NetworkNode(
            Configure(folder=str(folder), node_key_path=str(folder / "node.key"), bootstrap=bootstrap, run=RUN.hex()),
            self._event,
        )

    def _event(self, message: Message) -> None:
        if isinstance(message, Announced):
            self.heard[message.round, message.member] = time.monotonic()

    def blob(self, round: int) -> tuple[bytes, int]:
        return self.store.put(f"update {round} of {self.slot}".encode(), round)

    async def announce(self, round: int, gossip_alone: bool) -> None:
        digest, length = self.blob(round)
        if gossip_alone:
            node = self.node
            node._announcements.reached(round)
            raw = Announcement(RUN, round, node._key.public, digest, length).sign(node._key)
            node._announcements.offer(raw)
            await node._swarm.gossip.announcement(raw)
        else:
            await self.node.handle(Publish(round=round, member=self.slot, digest=digest.hex(), length=length))


def say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


async def work(folder: Path, slots: list[int], bootstrap: list[str]) -> None:
    """Be some of the nodes, and do what the lines on stdin say."""
    lines = lines_of_stdin()
    async with contextlib.AsyncExitStack() as stack:
        hosts: list[Host] = []
        for slot in slots:
            home = folder / str(slot)
            home.mkdir(parents=True)
            host = Host(home, slot, bootstrap)
            ready = await stack.enter_async_context(host.node.running())
            bootstrap = bootstrap or ready.multiaddrs
            hosts.append(host)
        keys = {host.slot: host.node._key.public.hex() for host in hosts}
        say(bootstrap=bootstrap, keys=keys)
        members = SetMembers.model_validate_json(await anext(lines))
        for host in hosts:
            await host.node.handle(members)
        others = len(members.members) - 1
        while any(len(h.node._swarm.connected()) < others or len(h.node._spreader.met) < others for h in hosts):
            await trio.sleep(0.2)
        say(met=len(hosts))
        async for line in lines:
            order = json.loads(line)
            before = resource.getrusage(resource.RUSAGE_SELF)
            await trio.sleep(max(0.0, order["at"] - time.monotonic()))
            await burst(hosts, order["round"], order["gossip_alone"], others, order["at"] + order["seconds"])
            after = resource.getrusage(resource.RUSAGE_SELF)
            say(
                latencies=[
                    at - order["at"] for h in hosts for (round, _), at in h.heard.items() if round == order["round"]
                ],
                cpu=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            )


async def burst(hosts: list[Host], round: int, gossip_alone: bool, others: int, until: float) -> None:
    async with trio.open_nursery() as nursery:
        for host in hosts:
            nursery.start_soon(host.announce, round, gossip_alone)
        if not gossip_alone:
            await trio.sleep(ASK_AFTER)
            for host in hosts:
                heard = {member for of, member in host.heard if of == round}
                # The digests of what is missing, as the chain tells them.
                wants = [
                    WantEntry(member=slot, digest=digest_of(round, slot).hex(), length=len(f"update {round} of {slot}"))
                    for slot in range(others + 1)
                    if slot != host.slot and slot not in heard
                ]
                if wants:
                    await host.node.handle(Want(round=round, wants=wants))
    while time.monotonic() < until and any(sum(of == round for of, _ in h.heard) < others for h in hosts):
        await trio.sleep(0.05)


def digest_of(round: int, slot: int) -> bytes:
    return blob_digest(f"update {round} of {slot}".encode())


async def lines_of_stdin() -> AsyncIterator[str]:
    while line := await trio.to_thread.run_sync(sys.stdin.readline):
        yield line


def measure(nodes: int, processes: int, seconds: float) -> None:
    """Start the processes, let the nodes meet, and print a line for each burst."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        workers: list[subprocess.Popen[str]] = []

        def start(number: int, bootstrap: list[str]) -> dict[str, Any]:
            slots = ",".join(str(slot) for slot in range(number, nodes, processes))
            command = [sys.executable, "-m", "benchmarks.network_gossip", "--worker", slots, "--folder", folder]
            worker = stack.enter_context(
                subprocess.Popen(
                    [*command, "--bootstrap", json.dumps(bootstrap)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env={**os.environ, "GRPC_VERBOSITY": "NONE"},
                )
            )
            stack.callback(worker.kill)
            workers.append(worker)
            return hear(worker)

        began = time.monotonic()
        first = start(0, [])
        keys = {int(slot): key for slot, key in first["keys"].items()}
        for number in range(1, processes):
            keys |= {int(slot): key for slot, key in start(number, first["bootstrap"])["keys"].items()}
        members = SetMembers(members=[MemberEntry(slot=slot, node_key=key) for slot, key in sorted(keys.items())])
        for worker in workers:
            tell(worker, members.model_dump_json())
        for worker in workers:
            hear(worker)
        print(f"{nodes} nodes in {processes} processes, all connected to all after {time.monotonic() - began:.0f} s")
        print(f"{'':24} {f'in {LIMIT:.0f} s':>8} {'in all':>8} {'p50':>7} {'p99':>7} {'max':>7} {'CPU':>7}")
        for round, (name, alone) in enumerate(
            (("gossip alone", True), ("announced", False), ("announced again", False)), 1
        ):
            time.sleep(3.0)
            order = {"round": round, "gossip_alone": alone, "at": time.monotonic() + 0.5, "seconds": seconds}
            for worker in workers:
                tell(worker, json.dumps(order))
            answers = [hear(worker) for worker in workers]
            latencies = sorted(latency for answer in answers for latency in answer["latencies"])
            print(line_of(name, latencies, nodes * (nodes - 1), sum(answer["cpu"] for answer in answers)), flush=True)


def line_of(name: str, latencies: list[float], all_of_them: int, cpu: float) -> str:
    def rank(share: float) -> str:
        return f"{latencies[min(len(latencies) - 1, int(share * len(latencies)))]:.2f} s" if latencies else "-"

    in_time = sum(latency < LIMIT for latency in latencies) / all_of_them
    shares = f"{in_time:8.1%} {len(latencies) / all_of_them:8.1%}"
    return f"{name:24} {shares} {rank(0.5):>7} {rank(0.99):>7} {rank(1.0):>7} {cpu:5.1f} s"


def tell(worker: subprocess.Popen[str], line: str) -> None:
    assert worker.stdin is not None
    worker.stdin.write(line + "\n")
    worker.stdin.flush()


def hear(worker: subprocess.Popen[str]) -> dict[str, Any]:
    assert worker.stdout is not None
    answer: dict[str, Any] = json.loads(worker.stdout.readline())
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=32)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=40.0, help="to wait for what is missing after a burst")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--bootstrap", type=json.loads, default=[], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is None:
        measure(arguments.nodes, arguments.processes, arguments.seconds)
    else:
        logging.disable(logging.CRITICAL)  # of libp2p, which says a lot while nodes meet
        # What a node alone on its host does not feel: while they meet, nodes that share two cores are slower than one
        # may be, and the pings of all 992 pairs would take a quarter of both.
        swarm.DIAL_SECONDS, swarm.DIALS_AT_ONCE, swarm.PING_EVERY = 60.0, 1, 60.0
        slots = [int(slot) for slot in arguments.worker.split(",")]
        trio.run(work, arguments.folder, slots, arguments.bootstrap)


if __name__ == "__main__":
    main()
