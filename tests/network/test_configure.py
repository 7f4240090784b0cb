"""What the network process refuses to start with, and what it announces."""

from __future__ import annotations

from pathlib import Path

import base58
import pytest
import trio

from psyche_node.identity import NodeKey
from psyche_node.ipc import Message
from psyche_node.network.addresses import NetworkError, announced_host, parse_run
from psyche_node.network.messages import Configure, MemberEntry, NetworkShutdown, Rejected, SetMembers, Shutdown
from psyche_node.network.node import NetworkNode
from psyche_node.network.reports import REPEAT_SECONDS, STRANGERS_AT_ONCE, STRANGERS_PER_SECOND, Reporter, Traffic

PEER = NodeKey(bytes(32)).node_id


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"run": "xyz"}, "not a run's address"),
        ({"run": "0" * 63}, "not a run's address"),
        ({"listen_host": "example.org"}, "give an IP address"),
        ({"bootstrap": [f"/dns4/example.org/tcp/1/p2p/{PEER}"]}, "not TCP over IP"),
        ({"bootstrap": ["/ip4/127.0.0.1/tcp/1"]}, "not TCP over IP"),
        ({"bootstrap": ["/ip4/127.0.0.1/tcp/1/p2p/QmX"]}, "not the PeerId of an Ed25519 key"),
        ({"faults": ["lie"]}, "the faults are"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_with_a_reason(
    tmp_path: Path, change: dict[str, object], reason: str
) -> None:
    fields = {"folder": str(tmp_path), "node_key_path": str(tmp_path / "node.key"), "run": "00" * 32, **change}
    with pytest.raises(Exception, match=reason):
        NetworkNode(Configure.model_validate(fields), print)


def test_a_runs_address_in_hex_and_in_base58() -> None:
    run = bytes(range(32))
    assert parse_run(run.hex()) == parse_run(base58.b58encode(run).decode()) == run
    for text in ("", "O0Il", run.hex()[:-2], base58.b58encode(bytes(33)).decode()):
        with pytest.raises(NetworkError):
            parse_run(text)


def test_the_announced_address_is_one_that_others_can_use() -> None:
    assert announced_host("127.0.0.1", []) == "127.0.0.1"
    assert announced_host("0.0.0.0", [(b"", "/ip4/127.0.0.1/tcp/1")]) == "127.0.0.1"
    assert announced_host("0.0.0.0", []) != "0.0.0.0"


def test_member_lists_that_contradict_themselves_are_refused(tmp_path: Path) -> None:
    node = NetworkNode(Configure(folder=str(tmp_path), node_key_path=str(tmp_path / "node.key"), run="00" * 32), print)
    key, other = "11" * 32, "22" * 32
    for pairs in ([(0, key), (0, other)], [(0, key), (1, key)]):
        message = SetMembers(members=[MemberEntry(slot=slot, node_key=node_key) for slot, node_key in pairs])
        with pytest.raises(NetworkError, match="share a slot or a node key"):
            trio.run(node.handle, message)


def test_shutdown_has_a_name_of_its_own_among_the_processes_messages() -> None:
    assert Message.registry["NetworkShutdown"] is NetworkShutdown is Shutdown


def test_refusals_are_counted_and_not_repeated() -> None:
    events: list[Message] = []
    now = 100.0
    reporter = Reporter(events.append, {b"k" * 32: 3}.get, clock=lambda: now)
    for _ in range(50):
        reporter.rejected("call", b"k" * 32, "no")
    reporter.rejected("call", b"j" * 32, "no")
    reporter.rejected("record", b"k" * 32, "no")
    now += REPEAT_SECONDS
    reporter.rejected("call", b"k" * 32, "no")
    rejected = [event for event in events if isinstance(event, Rejected)]
    assert [(event.what, event.member) for event in rejected] == [
        ("call", 3),
        ("call", None),
        ("record", 3),
        ("call", 3),
    ]
    assert "49 more" in rejected[-1].reason
    reporter.rejected("piece", b"k" * 32, "bad", always=True)
    reporter.rejected("piece", b"k" * 32, "bad", always=True)
    assert len(events) == 6


def test_traffic_is_counted_per_peer() -> None:
    traffic = Traffic()
    traffic.sent(b"a", 10)
    traffic.sent(b"a", 5, blob=True)
    traffic.received(b"b", 7, blob=True)
    assert traffic.per_peer() == {b"a": (15, 0), b"b": (0, 7)}
    assert (traffic.blob_sent, traffic.blob_received) == (5, 7)


def test_strangers_with_fresh_keys_are_said_now_and_then_and_members_always() -> None:
    events: list[Message] = []
    now = 100.0
    reporter = Reporter(events.append, {b"k" * 32: 3}.get, clock=lambda: now)
    for number in range(1000):
        reporter.rejected("call", number.to_bytes(32), "no")
    assert len(events) == STRANGERS_AT_ONCE
    reporter.rejected("call", b"k" * 32, "no")
    now += 1.01 / STRANGERS_PER_SECOND
    reporter.rejected("call", b"j" * 32, "no")
    member, stranger = events[int(STRANGERS_AT_ONCE) :]
    assert isinstance(member, Rejected)
    assert isinstance(stranger, Rejected)
    assert member.reason == "no"
    assert "900 refusals" in stranger.reason
    assert [one.count for one in reporter.refusals()] == [1002]
