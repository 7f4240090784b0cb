"""Punches on loopback, and the rendezvous before them over libp2p."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trio
from libp2p.abc import IHost
from libp2p.exceptions import BaseLibp2pError
from nat_nodes import Node, meet, until
from nodes_of_a_test import makers_of

from psyche_node.network.host import dial, listening, make_host, peer_of
from psyche_node.network.links import CallFailed, Cause
from psyche_node.network.nat.puncher import Puncher
from psyche_node.network.nat.rendezvous import MAX_BYTES, PUNCH, PUNCHES_AT_ONCE, Refused, Rendezvous
from psyche_node.network.wire import node_pb2 as wire

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[], Node]]:
    yield from makers_of(Node, tmp_path)


# The punch -----------------------------------------------------------------------------------------------------------


@dataclass
class Trio:
    """A helper, a caller and a private target."""

    helper: Node
    caller: Node
    target: Node

    def punchers(self, made: Callable[[bytes], None]) -> tuple[Puncher, Puncher]:
        def puncher(node: Node) -> Puncher:
            return Puncher(node.paths, node.links, node.directory, lambda: node.leaf, made)

        return puncher(self.caller), puncher(self.target)


@pytest.fixture
def three(make: Callable[[], Node]) -> Trio:
    helper, caller, target = make(), make(), make()
    meet(helper, caller)
    hidden = target.record(private=True, observed_ip="127.0.0.1")
    for node in (helper, caller):
        node.knows(helper.record(), caller.record(), hidden)
    target.knows(helper.record(), caller.record(), hidden)
    return Trio(helper, caller, target)


def run_punch(three: Trio, change: Callable[[wire.Punch], wire.Punch] = lambda reply: reply) -> str:
    """Have the caller want a path; the helper passes on what ``change`` makes of the reply. Returns why not, or ''."""
    outcome: list[str] = []

    async def scenario() -> None:
        caller, target = three.punchers(lambda peer: None)

        async def ask(helper: bytes, peer: bytes, address: str) -> wire.Punch:
            return change(await target._invited(three.caller.key.public, address, helper))

        async with trio.open_nursery() as target._nursery:
            try:
                await caller._through(three.helper.key.public, three.target.key.public, ask)
                outcome.append("")
            except (Refused, OSError) as error:
                outcome.append(str(error))
                target._nursery.cancel_scope.cancel()

    trio.run(scenario)
    return outcome[0]


def since(node: Node, other: Node) -> wire.SinceReply:
    return node.links.call(other.key.public, "Since", wire.SinceRequest(round=1), wire.SinceReply, 60.0)


def test_a_path_carries_calls_and_is_made_again_when_it_broke(three: Trio) -> None:
    for _ in range(2):
        with pytest.raises(CallFailed) as failed:
            since(three.caller, three.target)
        assert failed.value.cause is Cause.PRIVATE
        assert run_punch(three) == ""
        assert three.caller.paths.punched() == {three.target.key.public}
        assert since(three.caller, three.target) == wire.SinceReply()
        path = three.caller.paths.path(three.target.key.public, three.target.leaf.der_hash, ask=False)
        assert path is not None
        three.target.paths.close()
        until(lambda: not path.alive)  # noqa: B023
        assert three.caller.paths.punched() == set()


def test_a_channel_that_is_closed_in_this_moment_is_a_failed_call(three: Trio) -> None:
    three.caller.knows(three.helper.record())
    links, key = three.caller.links, three.helper.key.public
    closed = links._link(key)
    closed.channel.close()
    for attempt in (
        lambda: links.call(key, "Since", wire.SinceRequest(round=1), wire.SinceReply, 60.0),
        lambda: links.fetch(key, bytes(32), 0, 1, 60.0),
        lambda: links.push(key, iter([b""]), 60.0),
    ):
        with pytest.raises(CallFailed, match="made anew"):
            attempt()


def test_a_path_is_wanted_for_blobs_only_and_by_private_nodes(three: Trio) -> None:
    wanted: list[bytes] = []
    three.caller.paths.on_wanted(wanted.append)
    for private in (False, True):
        with pytest.raises(CallFailed):
            three.caller.links.fetch(three.target.key.public, bytes(32), 0, 1, 60.0)
        assert wanted == [three.target.key.public] * private
        three.caller.directory.add(replace(three.caller.record(private=True), seq=2), b"")
    wanted.clear()
    with pytest.raises(CallFailed):
        since(three.caller, three.target)
    assert wanted == []
    with pytest.raises(CallFailed) as failed:
        three.caller.links.fetch(three.target.key.public, bytes(32), 0, 1, 60.0)
    assert failed.value.cause is Cause.PRIVATE
    assert wanted == [three.target.key.public]


def test_a_helper_cannot_send_anybody_elsewhere(three: Trio, monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(reply: wire.Punch) -> wire.Punch:
        return wire.Punch(address="192.0.2.66:80", certificate=reply.certificate)

    def another(reply: wire.Punch) -> wire.Punch:
        return wire.Punch(address=reply.address, certificate=three.helper.leaf.certificate)

    punched: list[str] = []
    monkeypatch.setattr(
        "psyche_node.network.nat.puncher.punch", lambda port, address, seconds: punched.append(address) or 1 / 0
    )
    monkeypatch.setattr(Puncher, "_meet", _nothing)
    assert "its record says 127.0.0.1" in run_punch(three, elsewhere)
    assert "not the one in its record" in run_punch(three, another)
    # Nor the target, by naming another address of the caller.
    three.target.directory.add(replace(three.caller.record(), seq=2, grpc_address="192.0.2.66:80"), b"")
    assert "its record says 192.0.2.66" in run_punch(three)
    assert punched == []


def test_nobody_is_punched_at_within_this_machine(three: Trio, monkeypatch: pytest.MonkeyPatch) -> None:
    """A member may sign any IP address as its own, such as that of a loopback interface."""
    monkeypatch.setattr(Puncher, "_meet", _nothing)
    elsewhere = replace(three.target.record(private=True, observed_ip="192.0.2.9"), seq=2)
    three.target.directory.add(elsewhere, b"")
    assert "127.0.0.1 is no address of another machine" in run_punch(three)


async def _nothing(*_: object) -> None:
    pass


# The rendezvous over libp2p ------------------------------------------------------------------------------------------


def test_a_helper_helps_members_with_addresses_it_has_seen_and_not_too_often(three: Trio) -> None:
    """The real protocol between three hosts; what the target answers is fixed."""
    caller, target = three.caller, three.target
    invitations: list[tuple[bytes, str, bytes]] = []
    answer = wire.Punch(address="127.0.0.1:7", certificate=b"certificate")

    async def invited(who: bytes, address: str, helper: bytes) -> wire.Punch:
        invitations.append((who, address, helper))
        return answer

    async def not_invited(who: bytes, address: str, helper: bytes) -> wire.Punch:
        raise Refused("not this one")

    async def refusal(address: str) -> str:
        try:
            await asking.ask(three.helper.key.public, target.key.public, address)
        except Refused as error:
            return str(error)
        return ""

    asking: Rendezvous

    async def scenario() -> None:
        nonlocal asking
        async with contextlib.AsyncExitStack() as stack:
            hosts: dict[str, IHost] = {}
            for name, node, answers in (
                ("helper", three.helper, not_invited),
                ("caller", caller, not_invited),
                ("target", target, invited),
            ):
                hosts[name] = make_host(node.key)
                rendezvous = Rendezvous(hosts[name], node.directory, node.dialback, answers)
                if name == "caller":
                    asking = rendezvous
                port = await stack.enter_async_context(listening(hosts[name], "127.0.0.1", 0))
                if name == "helper":
                    where = f"/ip4/127.0.0.1/tcp/{port}"
            with trio.fail_after(60):
                await dial(hosts["caller"], three.helper.key.public, where, 60)
                assert "no connection of yours" in await refusal("127.0.0.1:6")
                seen = (await trio.to_thread.run_sync(caller.ask, three.helper, 0)).observed
                assert await refusal(seen) == "not connected to it"
                await dial(hosts["target"], three.helper.key.public, where, 60)
                assert "its connections do not come from" in await refusal(seen)
                assert invitations == [(caller.key.public, seen, three.helper.key.public)]
                answer.address = (await trio.to_thread.run_sync(target.ask, three.helper, 0)).observed
                assert await asking.ask(three.helper.key.public, target.key.public, seen) == answer
                answer.Clear()
                answer.refusal = "x" * 5000
                assert set(await refusal(seen)) == {"x"}
                for _ in range(int(PUNCHES_AT_ONCE)):
                    last = await refusal(seen)
                assert last == "too many punches lately"
                # Rubbish is not answered, and what is not a member's neither.
                for frame in (struct.pack(">I", MAX_BYTES + 1), struct.pack(">I", 3) + b"\xff" * 3):
                    assert await answer_to(hosts["caller"], three.helper, frame) == b""
                three.helper.directory.set_members({0: three.helper.key.public})
                before = len(invitations)
                with pytest.raises(BaseLibp2pError):
                    await asking.ask(three.helper.key.public, target.key.public, seen)
                assert len(invitations) == before

    async def answer_to(host: IHost, node: Node, frame: bytes) -> bytes:
        stream = await host.new_stream(peer_of(node.key.public), [PUNCH])
        await stream.write(frame)
        with contextlib.suppress(Exception):
            return await stream.read(100) or b""
        return b""

    trio.run(scenario)
