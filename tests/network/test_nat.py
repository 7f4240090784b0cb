"""Nodes behind NAT: real network processes in network namespaces, with nftables between them.

    private 0 -- nat 0 -- public -- nat 1 -- private 1

The public node's namespace routes between the two NATs. Needs root, network namespaces and nft; skipped without them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from network_driver import Process

from psyche_node.network.blobs import PIECE_BYTES
from psyche_node.network.messages import Fetched, GetStats, PeerDown, Publish, Stats, Want, WantEntry

PUBLIC_IP = "10.99.0.1"
ROUNDS = 3
pytestmark = pytest.mark.timeout(240)

# What a home router does: nobody comes in who was not called from inside, and it does not say so.
ROUTER = """
table ip nat {{
  chain outgoing {{
    type nat hook postrouting priority srcnat;
    oifname "outside" masquerade {how}
  }}
}}
table ip firewall {{
  chain passing {{
    type filter hook forward priority filter; policy drop;
    ct state established,related accept
    iifname "inside" accept
  }}
  chain arriving {{
    type filter hook input priority filter; policy accept;
    iifname "outside" ct state new drop
  }}
}}
"""


def run(*command: str, given: str | None = None) -> None:
    done = subprocess.run(command, input=given, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


class Internet:
    """The namespaces; ``how`` is what nft's masquerade does to ports."""

    def __init__(self, how: str) -> None:
        self._mark = f"psyche{os.getpid()}"
        names = ["public", "nat0", "nat1", "private0", "private1"]
        self._names = {name: f"{self._mark}-{name}" for name in names}
        for name in self._names.values():
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        public = self._names["public"]
        run("ip", "-n", public, "address", "add", f"{PUBLIC_IP}/32", "dev", "lo")
        self._forwards("public")
        for number in (0, 1):
            nat, private = self._names[f"nat{number}"], self._names[f"private{number}"]
            self._cable(public, f"to{number}", f"10.99.{number + 1}.1", nat, "outside", f"10.99.{number + 1}.2")
            self._cable(nat, "inside", "192.168.1.1", private, "home", "192.168.1.2")
            run("ip", "-n", nat, "route", "add", "default", "via", f"10.99.{number + 1}.1")
            run("ip", "-n", private, "route", "add", "default", "via", "192.168.1.1")
            self._forwards(f"nat{number}")
            run("ip", "netns", "exec", nat, "nft", "-f", "-", given=ROUTER.format(how=how))

    def within(self, name: str) -> list[str]:
        """Return the command that runs another one in a namespace."""
        return ["ip", "netns", "exec", self._names[name]]

    def close(self) -> None:
        for name in self._names.values():
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def _forwards(self, name: str) -> None:
        run(*self.within(name), "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")

    @staticmethod
    def _cable(left: str, left_name: str, left_ip: str, right: str, right_name: str, right_ip: str) -> None:
        run("ip", "-n", left, "link", "add", left_name, "type", "veth", "peer", "name", right_name, "netns", right)
        for where, name, ip in ((left, left_name, left_ip), (right, right_name, right_ip)):
            run("ip", "-n", where, "address", "add", f"{ip}/24", "dev", name)
            run("ip", "-n", where, "link", "set", name, "up")


def why_not() -> str | None:
    """Return why this machine cannot play the Internet, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool, package in (("ip", "iproute2"), ("nft", "nftables")):
        if shutil.which(tool) is None:
            return f"{tool} is not installed (apt-get install {package})"
    return None


@pytest.fixture
def internet() -> Iterator[Callable[[str], Internet]]:
    if (reason := why_not()) is not None:
        pytest.skip(f"no network namespaces with NAT on this machine: {reason}")
    made: list[Internet] = []

    def make(how: str) -> Internet:
        one = Internet.__new__(Internet)
        made.append(one)
        try:
            one.__init__(how)  # type: ignore[misc]
        except OSError as error:
            pytest.skip(f"this kernel has no namespaces with NAT for us: {error}")
        return one

    yield make
    for one in made:
        one.close()


@contextlib.asynccontextmanager
async def nodes(folder: Path, internet: Internet, **settings: Any) -> AsyncIterator[list[Process]]:
    """Run a public node and two private ones, all of them members."""
    started: list[Process] = []
    try:
        for name in ("public", "private0", "private1"):
            (folder / name).mkdir()
            started.append(Process(folder / name, internet.within(name)))
        public, *private = started
        await public.start([], listen_host=PUBLIC_IP)
        listening = [one.start(public.ready.multiaddrs, listen_host="0.0.0.0", **settings) for one in private]
        await asyncio.gather(*listening)
        for process in started:
            await process.members(*started)
        yield started
    finally:
        for process in started:
            if hasattr(process, "process") and process.process.poll() is None:
                process.process.kill()
                process.process.wait()


def blob_of(member: int, round: int) -> bytes:
    return bytes([member, round]) * (PIECE_BYTES // 2) + bytes([round]) * 12_345


async def publish(author: Process, member: int, round: int) -> WantEntry:
    digest, length = author.store.put(blob_of(member, round), round)
    await author.ask(Publish(round=round, member=member, digest=digest.hex(), length=length))
    return WantEntry(member=member, digest=digest.hex(), length=length)


async def exchange(processes: dict[int, Process], round: int) -> None:
    """Have each publish a blob, and each fetch all others'."""
    entries = [await publish(process, member, round) for member, process in processes.items()]
    for member, process in processes.items():
        await process.ask(Want(round=round, wants=[entry for entry in entries if entry.member != member]))
    for member, process in processes.items():
        for entry in entries:
            if entry.member != member:
                await process.wait(Fetched, round=round, member=entry.member)
                path = process.store.path(bytes.fromhex(entry.digest))
                assert path is not None
                assert path.read_bytes() == blob_of(entry.member, round)


async def paths_of(process: Process) -> set[int | None]:
    """Return the members that a private node has punched a path to."""
    stats = await process.endpoint.call(GetStats(), Stats)
    assert stats.private
    return {peer.slot for peer in stats.per_peer if peer.punched}


def test_two_private_nodes_find_a_path_and_go_on_without_anybody_else(
    tmp_path: Path, internet: Callable[[str], Internet]
) -> None:
    async def scenario() -> None:
        async with nodes(tmp_path, internet("")) as (public, first, second):
            for round in range(ROUNDS):
                await exchange({0: public, 1: first, 2: second}, round)
            # A path is made when a blob of a private node is wanted, in each direction one.
            async with asyncio.timeout(90):
                while not (await paths_of(first) and await paths_of(second)):
                    round += 1
                    await exchange({0: public, 1: first, 2: second}, round)
            public.process.kill()
            await first.wait(PeerDown, slot=0)
            await exchange({1: first, 2: second}, round + 1)
            assert first.seen(Fetched)[-1].source == second.key.node_id
            assert second.seen(Fetched)[-1].source == first.key.node_id
            for process in (first, second):
                assert "Traceback" not in process.log_text()
                assert await process.stop() == 0

    asyncio.run(scenario())


def test_symmetric_nat_leaves_push_and_pull(tmp_path: Path, internet: Callable[[str], Internet]) -> None:
    async def scenario() -> None:
        async with nodes(tmp_path, internet("fully-random")) as processes:
            public, first, second = processes
            for round in range(ROUNDS):
                await exchange({0: public, 1: first, 2: second}, round)
            for process, other in ((first, second), (second, first)):
                # It was tried.
                async with asyncio.timeout(90):
                    while f"no path through the NATs to {other.key.node_id}" not in process.log_text():
                        await asyncio.sleep(0.1)
                assert await paths_of(process) == set()
                # What is not the public node's came by way of it.
                assert {event.source for event in process.seen(Fetched)} == {public.key.node_id}
            # What was pushed to that one is here before it looks for it, or after.
            pushed = {event.source for event in public.seen(Fetched)}
            assert pushed <= {process.key.node_id for process in processes}
            assert len(public.seen(Fetched)) == 2 * ROUNDS
            for process in processes:
                assert "Traceback" not in process.log_text()
                assert await process.stop() == 0

    asyncio.run(scenario())
