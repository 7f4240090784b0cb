"""Announcements and node records: the exact bytes, and that hostile ones are refused and nothing else happens."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from psyche_node.identity import NodeKey
from psyche_node.network.announcements import ROUNDS_AHEAD, Announcements, Verdict
from psyche_node.network.directory import MAX_CANDIDATES, Directory
from psyche_node.network.messages import MAX_BLOB_BYTES, MAX_ROUND
from psyche_node.network.statements import (
    MAX_ANNOUNCEMENT,
    MAX_RECORD,
    Announcement,
    Malformed,
    NodeRecord,
    join_address,
    join_multiaddr,
    split_address,
    split_multiaddr,
)
from psyche_node.network.wire import node_pb2 as wire

KEY = NodeKey(bytes(range(32)))
OTHER = NodeKey(bytes(range(1, 33)))
RUN = bytes(range(100, 132))
DIGEST = bytes(range(200, 232))
ANNOUNCEMENT = Announcement(RUN, 300, KEY.public, DIGEST, 60_000)
RECORD = NodeRecord(
    RUN, KEY.public, 1_800_000_000_000, ("/ip4/127.0.0.1/tcp/4001",), "127.0.0.1:4002", DIGEST, 1_900_000_000
)
KNOWN_ANNOUNCEMENT = (
    "0a6d0a206465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f8081828310ac021a2003a107bff3ce10be1d"
    "70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b82220c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0"
    "e1e2e3e4e5e6e728e0d403124052e6df2e60a8202aa5c2ac8e2ecc00006558a8498f1d9a2cfb38fc2b26f9a834e55c8b9dc5"
    "207ed4ab1fac710ac6109d7a78facaeca9e3218a89d8e0ca0c1909"
)
KNOWN_RECORD = (
    "0a9c010a206465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f80818283122003a107bff3ce10be1d70dd"
    "18e74bc09967e4d6309ba50d5f1ddc8664125531b81880a0f1c2b13422172f6970342f3132372e302e302e312f7463702f34"
    "3030312a0e3132372e302e302e313a343030323220c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4"
    "e5e6e73880e6fe890712405563f24f65d6b082eddadf680762bf738511ea8129ec1ad9a0a95c52e543f7c5cb7f14d62478d3"
    "9bd4ef3da92f28211495759a6e8946b8a5ea0b2e3d1f61c600"
)


def test_announcement_known_answer() -> None:
    assert ANNOUNCEMENT.sign(KEY).hex() == KNOWN_ANNOUNCEMENT
    assert Announcement.parse(bytes.fromhex(KNOWN_ANNOUNCEMENT), RUN) == ANNOUNCEMENT


def test_record_known_answer() -> None:
    assert RECORD.sign(KEY).hex() == KNOWN_RECORD
    assert NodeRecord.parse(bytes.fromhex(KNOWN_RECORD), RUN) == RECORD


@given(st.integers(0, MAX_ROUND), st.binary(min_size=32, max_size=32), st.integers(1, MAX_BLOB_BYTES))
@example(MAX_ROUND, bytes([255]) * 32, MAX_BLOB_BYTES)
def test_announcements_round_trip_within_their_bound(round: int, digest: bytes, length: int) -> None:
    announcement = Announcement(RUN, round, KEY.public, digest, length)
    raw = announcement.sign(KEY)
    assert len(raw) <= MAX_ANNOUNCEMENT
    assert Announcement.parse(raw, RUN) == announcement


@given(st.binary(max_size=MAX_RECORD + 10))
def test_no_bytes_parse_by_accident(raw: bytes) -> None:
    for kind in (Announcement, NodeRecord):
        with pytest.raises(Malformed):
            kind.parse(raw, RUN)


@given(st.data())
def test_any_changed_byte_is_noticed(data: st.DataObject) -> None:
    kind, statement = data.draw(st.sampled_from([(Announcement, ANNOUNCEMENT), (NodeRecord, RECORD)]))
    raw = bytearray(statement.sign(KEY))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(Malformed):
        kind.parse(bytes(raw), RUN)


@given(st.data())
def test_any_cut_or_addition_is_noticed(data: st.DataObject) -> None:
    kind, statement = data.draw(st.sampled_from([(Announcement, ANNOUNCEMENT), (NodeRecord, RECORD)]))
    raw = statement.sign(KEY)
    cut = raw[: data.draw(st.integers(0, len(raw) - 1))]
    grown = raw + data.draw(st.binary(min_size=1, max_size=30))
    for changed in (cut, grown):
        with pytest.raises(Malformed):
            kind.parse(changed, RUN)


def signed(body: bytes, context: bytes = b"psyche-node/announcement/1:", key: NodeKey = KEY) -> bytes:
    return wire.Signed(body=body, signature=key.sign(context + body)).SerializeToString(deterministic=True)


def announcement_body(**fields: object) -> bytes:
    values = {"run": RUN, "round": 1, "node_key": KEY.public, "digest": DIGEST, "length": 1, **fields}
    return wire.Announcement(**values).SerializeToString()


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (signed(announcement_body(run=bytes(32))), "another run"),
        (signed(announcement_body(digest=b"short")), "digest"),
        (signed(announcement_body(round=2**64 - 1)), "round"),
        (signed(announcement_body(length=0)), "length"),
        (signed(announcement_body(length=MAX_BLOB_BYTES + 1)), "length"),
        (signed(announcement_body(node_key=b"")), "node key"),
        (signed(announcement_body(), key=OTHER), "signature"),
        (signed(announcement_body(), context=b"psyche-node/record/1:"), "signature"),
        (signed(announcement_body() + bytes(400)), "at most 512"),
        (signed(announcement_body() + b"\x98\x06\x00"), "body is not in the one canonical encoding"),
        (signed(announcement_body()) + b"\x98\x06\x00", "not in the one canonical encoding"),
        (b"", "another run"),
        (b"\x0a\xff\xff\xff\xff\x0f", "parse"),
    ],
)
def test_announcements_that_are_signed_and_still_wrong(raw: bytes, reason: str) -> None:
    with pytest.raises(Malformed, match=reason):
        Announcement.parse(raw, RUN)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"grpc_address": "example.org:80"}, "not IP"),
        ({"grpc_address": "0.0.0.0:80"}, "nobody"),
        ({"grpc_address": "127.0.0.1:0"}, "port"),
        ({"grpc_address": "127.0.0.1:65536"}, "port"),
        ({"grpc_address": "[127.0.0.1:80"}, "not IP"),
        ({"grpc_address": "unix:/run/x"}, "not IP"),
        ({"grpc_address": "[fe80::1%lo]:80"}, "names an interface"),
        ({"grpc_address": "1" * 1000}, "address of 1000 bytes"),
        ({"p2p_addresses": ()}, "0 addresses"),
        ({"p2p_addresses": ("/ip4/127.0.0.1/tcp/1",) * 9}, "9 addresses"),
        ({"p2p_addresses": ("/ip4/127.0.0.1/udp/1/quic-v1",)}, "not TCP"),
        ({"p2p_addresses": ("/dns4/example.org/tcp/1",)}, "not TCP"),
        ({"p2p_addresses": ("/ip6/127.0.0.1/tcp/1",)}, "not TCP"),
        ({"p2p_addresses": ("/ip4/224.0.0.1/tcp/1",)}, "nobody"),
        ({"tls_leaf": b"short"}, "TLS leaf"),
        ({"observed_ip": "192.0.2.1"}, "only a private node"),
        ({"is_private": True, "observed_ip": "example.org"}, "not IP"),
        ({"is_private": True, "observed_ip": "0.0.0.0"}, "nobody"),
        ({"is_private": True, "observed_ip": "2001:db8:0::1"}, "as it is written"),
        ({"is_private": True, "observed_ip": "1" * 1000}, "address of"),
        ({"run": bytes(32)}, "another run"),
    ],
)
def test_records_that_are_signed_and_still_wrong(change: dict[str, object], reason: str) -> None:
    with pytest.raises(Malformed, match=reason):
        NodeRecord.parse(dataclasses.replace(RECORD, **change).sign(KEY), RUN)


@given(st.ip_addresses().filter(lambda ip: not ip.is_multicast and not ip.is_unspecified), st.integers(1, 65535))
def test_addresses_round_trip(ip: object, port: int) -> None:
    for join, split in ((join_address, split_address), (join_multiaddr, split_multiaddr)):
        assert split(join(str(ip), port)) == (str(ip), port)


@given(st.text(max_size=140))
def test_no_text_is_an_address_by_accident(text: str) -> None:
    for join, split in ((join_address, split_address), (join_multiaddr, split_multiaddr)):
        try:
            ip, port = split(text)
        except Malformed:
            continue
        assert split(join(ip, port)) == (ip, port)


# The rules by which announcements are taken --------------------------------------------------------------------------


def announcements(*members: NodeKey) -> Announcements:
    directory = Directory(bytes(32))
    directory.set_members({slot: key.public for slot, key in enumerate(members)})
    return Announcements(RUN, directory)


def test_one_announcement_per_member_and_round() -> None:
    book = announcements(OTHER, KEY)
    book.reached(300)
    raw = ANNOUNCEMENT.sign(KEY)
    first = book.offer(raw)
    assert (first.verdict, first.slot, first.announcement) == (Verdict.NEW, 1, ANNOUNCEMENT)
    assert book.offer(raw).verdict is Verdict.KNOWN
    second = book.offer(dataclasses.replace(ANNOUNCEMENT, digest=bytes(32)).sign(KEY))
    assert second.verdict is Verdict.REFUSED
    assert "second, different" in second.reason
    assert book.offer(dataclasses.replace(ANNOUNCEMENT, round=301).sign(KEY)).verdict is Verdict.NEW
    assert book.bitmap(300) == b"\x02"
    assert book.missing_from(300, b"") == [raw]
    assert book.missing_from(300, b"\x02") == []
    assert book.missing_from(300, b"\x01") == [raw]


def test_an_author_that_is_no_member_is_refused_by_name() -> None:
    outcome = announcements(OTHER).offer(dataclasses.replace(ANNOUNCEMENT, round=0).sign(KEY))
    assert outcome.verdict is Verdict.REFUSED
    assert outcome.announcement is not None
    assert outcome.announcement.node_key == KEY.public
    assert "not a member" in outcome.reason


def test_the_window_of_rounds_moves_and_bounds_memory() -> None:
    book = announcements(KEY)
    book.reached(300)
    assert book.offer(dataclasses.replace(ANNOUNCEMENT, round=300 + ROUNDS_AHEAD).sign(KEY)).verdict is Verdict.NEW
    assert book.offer(dataclasses.replace(ANNOUNCEMENT, round=301 + ROUNDS_AHEAD).sign(KEY)).verdict is Verdict.OUTSIDE
    book.forget(310)
    assert book.missing_from(300 + ROUNDS_AHEAD, b"") == []
    assert book.offer(ANNOUNCEMENT.sign(KEY)).verdict is Verdict.OUTSIDE
    assert book.offer(dataclasses.replace(ANNOUNCEMENT, round=310).sign(KEY)).verdict is Verdict.NEW


# The directory -------------------------------------------------------------------------------------------------------


def record_of(key: NodeKey, seq: int = 1) -> NodeRecord:
    return dataclasses.replace(RECORD, node_key=key.public, seq=seq)


def test_the_newer_record_wins_and_one_from_the_future_is_not_taken() -> None:
    directory = Directory(bytes(32))
    assert directory.add(record_of(KEY, 5), b"5")
    assert not directory.add(record_of(KEY, 5), b"5")
    assert not directory.add(record_of(KEY, 4), b"4")
    assert directory.add(record_of(KEY, 6), b"6")
    assert directory.raw_records(10) == [b"6"]
    assert not directory.add(record_of(KEY, 2**63), b"never to be replaced")


def test_strangers_cannot_push_out_members() -> None:
    directory = Directory(OTHER.public)
    directory.add(record_of(OTHER), b"own")
    directory.set_members({7: KEY.public})
    directory.add(record_of(KEY), b"member")
    for number in range(2 * MAX_CANDIDATES):
        stranger = dataclasses.replace(RECORD, node_key=number.to_bytes(32, "big"), seq=1)
        directory.add(stranger, number.to_bytes(2, "big"))
    records = directory.raw_records(1000)
    assert records[:2] == [b"own", b"member"]
    assert len(records) == 2 + MAX_CANDIDATES
    assert records[2] == (2 * MAX_CANDIDATES - 1).to_bytes(2, "big")


def test_sources_are_members_with_an_address_that_are_not_banned() -> None:
    directory = Directory(OTHER.public)
    directory.add(record_of(KEY), b"")
    everyone = [KEY.public, OTHER.public, bytes(32)]
    assert directory.sources(everyone) == []
    directory.set_members({0: KEY.public, 1: OTHER.public, 2: bytes(32)})
    assert directory.sources(everyone) == [KEY.public]
    assert directory.unknown_members() == [2]
    assert directory.ban(KEY.public)
    assert not directory.ban(KEY.public)
    assert directory.sources(everyone) == []


def test_a_ban_goes_with_the_wallet_to_its_next_node_key() -> None:
    """And not with the slot, which a wallet that has left leaves to another one."""
    directory = Directory(OTHER.public)
    keys = [bytes([number]) * 32 for number in range(4)]
    for key in keys:
        directory.add(dataclasses.replace(RECORD, node_key=key, seq=1), key)
    directory.set_members({0: keys[0]}, {keys[0]: "one"})
    assert directory.ban(keys[0])
    directory.set_members({0: keys[1]}, {keys[1]: "one"})
    assert directory.banned(keys[1])
    assert directory.sources(keys) == []
    directory.set_members({0: keys[2], 1: keys[0]}, {keys[2]: "two", keys[0]: "three"})
    assert directory.sources(keys) == [keys[2]]
    directory.set_members({0: keys[3]})
    assert not directory.banned(keys[3])
