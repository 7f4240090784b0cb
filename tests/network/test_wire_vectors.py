"""The known answers of the wire, reached a second time from docs/reference/wire.md, and read by this project's readers.

Messages are encoded by hand here, keys and hashes come from libraries.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import wire_vectors
from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from fuzzing_bulk import Bytes
from libp2p.identity_utils import create_identity_from_seed
from libp2p.peer.id import ID
from libp2p.security.tls.certificate import decode_signed_key

from psyche_node.network.bulk import frames
from psyche_node.network.directory import Directory
from psyche_node.network.kademlia import Records
from psyche_node.network.peerstore import Peerstore
from psyche_node.network.statements import Announcement, Malformed, NodeRecord

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "vectors" / "wire.json").read_text())
PIECE = 1 << 20


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: int | bytes | str) -> bytes:
    """A protobuf field; proto3 leaves out zeros and empty bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value) if value else b""
    raw = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(raw)) + raw if raw else b""


def element(number: int, raw: bytes) -> bytes:
    """One element of a repeated field, which is there also when it is empty."""
    return varint(number << 3 | 2) + varint(len(raw)) + raw


def signed(seed: bytes, context: bytes, body: bytes) -> bytes:
    return field(1, body) + field(2, Ed25519PrivateKey.from_private_bytes(seed).sign(context + body))


def public(seed: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def content(length: int) -> bytes:
    return bytes((31 * index + index // 251) % 256 for index in range(length))


def test_the_file_is_current() -> None:
    assert wire_vectors.FILE.read_text() == wire_vectors.text(), "run: python tests/network/wire_vectors.py"


@pytest.mark.parametrize("row", VECTORS["keys"])
def test_peer_ids(row: dict[str, str]) -> None:
    seed = bytes.fromhex(row["seed"])
    assert public(seed).hex() == row["public"]
    assert str(ID.from_pubkey(create_identity_from_seed(seed).public_key)) == row["peer_id"]


@pytest.mark.parametrize("row", VECTORS["announcements"])
def test_announcements(row: dict[str, Any]) -> None:
    seed, run, digest = (bytes.fromhex(row[name]) for name in ("seed", "run", "digest"))
    body = field(1, run) + field(2, row["round"]) + field(3, public(seed)) + field(4, digest) + field(5, row["length"])
    assert body.hex() == row["body"]
    raw = signed(seed, b"psyche-node/announcement/1:", body)
    assert raw.hex() == row["signed"]
    assert Announcement.parse(raw, run).round == row["round"]


@pytest.mark.parametrize("row", VECTORS["node_records"])
def test_node_records(row: dict[str, Any]) -> None:
    seed, run = bytes.fromhex(row["seed"]), bytes.fromhex(row["run"])
    addresses = b"".join(element(4, address.encode()) for address in row["p2p_addresses"])
    body = field(1, run) + field(2, public(seed)) + field(3, row["seq"]) + addresses + field(5, row["grpc_address"])
    body += field(6, bytes.fromhex(row["tls_leaf"])) + field(7, row["tls_expires"])
    body += field(8, int(row["is_private"])) + field(9, row["observed_ip"])
    body += field(10, row["bulk_address"])
    assert body.hex() == row["body"]
    raw = signed(seed, b"psyche-node/record/1:", body)
    assert raw.hex() == row["signed"]
    assert NodeRecord.parse(raw, run).seq == row["seq"]


def test_bulk_frames() -> None:
    rows = VECTORS["bulk_frames"]
    request = field(1, bytes(range(32))) + field(2, 3) + field(3, 2) + field(4, 1)
    assert rows["request"] == {"message": request.hex(), "frame": (struct.pack(">I", len(request)) + request).hex()}
    assert frames.read_request(Bytes(bytes.fromhex(rows["request"]["frame"]))) == request
    piece = bytes.fromhex(rows["piece"]["bytes"])
    assert rows["piece"]["frame"] == (struct.pack(">I", len(piece)) + piece).hex()
    assert frames.read_frame(Bytes(bytes.fromhex(rows["piece"]["frame"])), memoryview(bytearray(PIECE))) == piece
    for row in rows["ends"]:
        reason = row["reason"].encode()
        assert row["frame"] == (bytes(4) + bytes([row["status"], len(reason)]) + reason).hex()
        end = frames.read_frame(Bytes(bytes.fromhex(row["frame"])), memoryview(bytearray(PIECE)))
        assert end == frames.End(row["status"], row["reason"])
    assert rows["alpn"] == "psyche-bulk/1"


@pytest.mark.parametrize("row", VECTORS["refused"], ids=lambda row: row["announcement"])
def test_statements_that_must_be_refused(row: dict[str, str]) -> None:
    with pytest.raises(Malformed):
        Announcement.parse(bytes.fromhex(row["signed"]), bytes.fromhex(VECTORS["names"]["run"]))


@pytest.mark.parametrize("row", VECTORS["gossip_message_ids"])
def test_gossip_message_ids(row: dict[str, Any]) -> None:
    topics = b"".join(b"\0" + topic.encode() for topic in row["topics"])
    assert blake3(bytes.fromhex(row["data"]) + topics).hexdigest() == row["id"]


@pytest.mark.parametrize("row", VECTORS["records_frames"])
def test_records_frames(row: dict[str, Any]) -> None:
    body = b"".join(element(1, bytes.fromhex(raw)) for raw in row["records"])
    assert (len(body).to_bytes(4, "big") + body).hex() == row["frame"]


@pytest.mark.parametrize("row", VECTORS["announce_frames"])
def test_announce_frames(row: dict[str, Any]) -> None:
    body = b"".join(element(1, bytes.fromhex(raw)) for raw in row["announcements"])
    assert row["frame"] == (len(body).to_bytes(4, "big") + body).hex()
    assert row["answer"] == "00000000"


@pytest.mark.parametrize("row", VECTORS["kademlia"])
def test_kademlia(row: dict[str, str]) -> None:
    assert row["key"] == f"/psyche-{row['run'][:32]}/{row['node_key']}"
    run = bytes.fromhex(row["run"])
    directory = Directory(bytes(32))
    directory.set_members({0: bytes.fromhex(row["node_key"])})
    Records(run, directory).validate(row["key"], bytes.fromhex(row["value"]))


@pytest.mark.parametrize("row", VECTORS["peers_files"])
def test_peers_files(row: dict[str, Any], tmp_path: Path) -> None:
    body = b"".join(element(1, bytes.fromhex(raw)) for raw in row["records"])
    raw = b"psyche-node peers 1\n" + blake3(body).digest() + body
    assert row["file"] == raw.hex()
    (tmp_path / "peers").write_bytes(raw)
    known = Peerstore(tmp_path / "peers", bytes.fromhex(VECTORS["names"]["run"]), lambda: 0.0).load()
    assert [one.raw.hex() for one in known] == row["records"]


@pytest.mark.parametrize("row", VECTORS["blobs"], ids=lambda row: str(row["length"]))
def test_blobs(row: dict[str, Any]) -> None:
    length = row["length"]
    data = content(length)
    pieces = [blake3(data[at : at + PIECE]).digest() for at in range(0, length, PIECE)]
    assert [piece.hex() for piece in pieces] == row["pieces"]
    context = "psyche-node 2026-11 blob root: u64 length, then the digests of its 1 MiB pieces"
    root = blake3(struct.pack("<Q", length) + b"".join(pieces), derive_key_context=context)
    assert root.hexdigest() == row["digest"]
    assert (field(1, length) + field(2, b"".join(pieces))).hex() == row["manifest"]


@pytest.mark.parametrize("row", VECTORS["tls_extension"])
def test_tls_extension(row: dict[str, str]) -> None:
    leaf = ec.derive_private_key(int(row["p256_private_key"], 16), ec.SECP256R1()).public_key()
    spki = leaf.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert spki.hex() == row["subject_public_key_info"]
    seed = bytes.fromhex(row["seed"])
    decoded = decode_signed_key(bytes.fromhex(row["extension_value"]))
    assert decoded.public_key_bytes == field(1, 1) + field(2, public(seed))
    signature = Ed25519PrivateKey.from_private_bytes(seed).sign(b"libp2p-tls-handshake:" + spki)
    assert decoded.signature == signature


def test_null_ca() -> None:
    (row,) = VECTORS["null_ca"]
    scalar = hashlib.sha256(b"psyche-node null CA: this private key is public on purpose").digest()[:31]
    assert int(row["p256_private_key"], 16) == int.from_bytes(scalar, "big")
    key = ec.derive_private_key(int.from_bytes(scalar, "big"), ec.SECP256R1()).public_key()
    assert key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo).hex() == row["subject_public_key_info"]


@pytest.mark.parametrize(
    "row", VECTORS["trees"], ids=lambda row: f"{len(row['members'])} members, {len(row['private'])} private"
)
def test_trees(row: dict[str, Any]) -> None:
    context = "psyche-node 2026-11 order of passing on: u64 round, node key"

    def place(member: str) -> bytes:
        return blake3(struct.pack("<Q", row["round"]) + bytes.fromhex(member), derive_key_context=context).digest()

    circle = sorted(row["members"], key=place)
    at = circle.index(row["author"])
    others = circle[at + 1 :] + circle[:at]
    order = [row["author"], *(one for one in others if one not in row["private"])]
    order += [one for one in others if one in row["private"]]
    assert row["order"] == order
    assert row["children"] == [order[2 * at + 1 : 2 * at + 3] for at in range(len(order))]


def test_calls() -> None:
    rows = {row["path"].rpartition("/")[2]: row for row in VECTORS["calls"]}
    announced, digest = bytes.fromhex(VECTORS["announcements"][0]["signed"]), bytes(range(200, 232))
    assert rows["Announce"]["request"] == element(1, announced).hex()
    assert rows["Announce"]["reply"] == ""
    wanted = element(3, digest) + element(3, bytes(32))
    assert rows["Since"]["request"] == (field(1, 300) + field(2, b"\x05\x80") + wanted).hex()
    assert (
        rows["Since"]["reply"]
        == (
            element(1, announced) + element(2, digest) + element(3, element(1, bytes(32)) + field(2, b"\x0f\x02"))
        ).hex()
    )
    assert rows["GetManifest"]["request"] == (field(1, digest) + field(2, 32_768)).hex()
    assert rows["GetManifest"]["reply"] == (field(1, PIECE + 1) + field(2, digest + bytes(32))).hex()
    assert rows["Fetch"]["request"] == (field(1, digest) + field(2, 2) + field(3, 16) + field(4, 2)).hex()
    assert rows["Have"]["request"] == element(1, digest).hex()
    assert rows["Have"]["reply"] == ""
    assert rows["DialBack"]["request"] == field(1, 4002).hex()
    assert rows["DialBack"]["reply"] == (field(1, "203.0.113.9:50000") + field(2, 1)).hex()
    for row in rows.values():
        request = bytes.fromhex(row["request"])
        assert row["framed"] == (b"\0" + len(request).to_bytes(4, "big") + request).hex()
    assert rows["Fetch"]["first_message_framed"] == (b"\0\0\0\0\3" + content(3)).hex()


@pytest.mark.parametrize("row", VECTORS["pushes"], ids=lambda row: str(row["length"]))
def test_pushes(row: dict[str, Any]) -> None:
    data = content(row["length"])
    pieces = b"".join(blake3(data[at : at + PIECE]).digest() for at in range(0, len(data), PIECE))
    context = "psyche-node 2026-11 blob root: u64 length, then the digests of its 1 MiB pieces"
    digest = blake3(struct.pack("<Q", len(data)) + pieces, derive_key_context=context).digest()
    assert row["header"] == (field(1, 300) + field(2, digest) + field(3, len(data))).hex()
    assert row["list"] == (pieces.hex() if len(data) > PIECE else "")
    assert row["reply"] == ""


def test_punches() -> None:
    keys = [bytes.fromhex(row["public"]) for row in VECTORS["keys"]]
    bodies = {
        "request": field(1, keys[1]) + field(2, "203.0.113.9:50000"),
        "invitation": field(1, keys[0]) + field(2, "203.0.113.9:50000"),
        "answer": field(2, "198.51.100.7:40000") + field(3, b"PEM"),
        "refusal": field(4, "not connected to it"),
    }
    frames = {row["punch"]: row["frame"] for row in VECTORS["punches"]}
    assert frames == {name: (len(body).to_bytes(4, "big") + body).hex() for name, body in bodies.items()}
