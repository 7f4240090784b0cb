"""Known answers for docs/reference/wire.md, from fixed keys: what a second implementation has to reproduce.

python tests/network/wire_vectors.py            writes tests/vectors/wire.json
python tests/network/wire_vectors.py --check    changes nothing; exit status 1 if the file is not current
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from libp2p.host.ping import ID as PING
from libp2p.pubsub.gossipsub import PROTOCOL_ID, PROTOCOL_ID_V11, PROTOCOL_ID_V12
from libp2p.pubsub.pb import rpc_pb2
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX

from psyche_node.identity import NodeKey
from psyche_node.network import (
    announcements,
    blobs,
    certificates,
    direct,
    fanout,
    gossip,
    guard,
    messages,
    peerstore,
    push,
    records,
    sending,
    service,
    statements,
)
from psyche_node.network.bulk import frames
from psyche_node.network.nat import rendezvous
from psyche_node.network.wire import node_pb2 as wire

FILE = Path(__file__).resolve().parents[1] / "vectors" / "wire.json"
KEY = NodeKey(bytes(range(32)))
OTHER = NodeKey(bytes(range(1, 33)))
RUN = bytes(range(100, 132))
DIGEST = bytes(range(200, 232))
TLS_SCALAR = int.from_bytes(bytes(range(1, 33)), "big")
PIECE = blobs.PIECE_BYTES
Row = dict[str, Any]


def content(length: int) -> bytes:
    """The bytes of the vectors' blobs: byte i is (31 i + i div 251) mod 256."""
    period = bytes((31 * i + i // 251) % 256 for i in range(251 * 256))
    return (period * (length // len(period) + 1))[:length]


def keys() -> list[Row]:
    return [{"seed": key.seed.hex(), "public": key.public.hex(), "peer_id": key.node_id} for key in (KEY, OTHER)]


def announcement_rows() -> list[Row]:
    rows = []
    for key, number, length in ((KEY, 300, 60_000), (OTHER, 0, 1), (KEY, messages.MAX_ROUND, messages.MAX_BLOB_BYTES)):
        said = statements.Announcement(RUN, number, key.public, DIGEST, length)
        rows.append(
            {
                "seed": key.seed.hex(),
                "run": RUN.hex(),
                "round": number,
                "digest": DIGEST.hex(),
                "length": length,
                "body": said.body().hex(),
                "signed": said.sign(key).hex(),
            }
        )
    return rows


def record(key: NodeKey, seq: int, p2p: tuple[str, ...], address: str, **more: Any) -> statements.NodeRecord:
    return statements.NodeRecord(RUN, key.public, seq, p2p, address, DIGEST, 1_900_000_000, **more)


RECORDS = (
    record(KEY, 1_800_000_000_000, ("/ip4/127.0.0.1/tcp/4001",), "127.0.0.1:4002"),
    record(OTHER, 1, ("/ip4/192.0.2.7/tcp/1", "/ip6/2001:db8::7/tcp/65535"), "[2001:db8::7]:65535"),
    record(KEY, 2, ("/ip4/192.168.1.2/tcp/4001",), "192.168.1.2:4002", is_private=True, observed_ip="203.0.113.9"),
    record(OTHER, 3, ("/ip4/192.168.1.2/tcp/4001",), "192.168.1.2:4002", is_private=True),
    record(KEY, 4, ("/ip4/192.0.2.7/tcp/4001",), "192.0.2.7:4002", bulk_address="192.0.2.7:4003"),
)


def record_rows() -> list[Row]:
    rows = []
    for key, said in zip((KEY, OTHER, KEY, OTHER, KEY), RECORDS, strict=True):
        rows.append(
            {
                "seed": key.seed.hex(),
                "run": RUN.hex(),
                "seq": said.seq,
                "p2p_addresses": list(said.p2p_addresses),
                "grpc_address": said.grpc_address,
                "tls_leaf": said.tls_leaf.hex(),
                "tls_expires": said.tls_expires,
                "is_private": said.is_private,
                "observed_ip": said.observed_ip,
                "bulk_address": said.bulk_address,
                "body": said.body().hex(),
                "signed": said.sign(key).hex(),
            }
        )
    return rows


def message_ids() -> list[Row]:
    data, topic = announcement_rows()[0]["signed"], names()["topics"]["announcements"]
    message = rpc_pb2.Message(data=bytes.fromhex(data), topicIDs=[topic])
    return [{"data": data, "topics": [topic], "id": gossip._message_id(message).decode()}]


def frame_rows() -> list[Row]:
    rows = []
    for signed in ([], [said.sign(key) for key, said in zip((KEY, OTHER), RECORDS[:2], strict=True)]):
        body = wire.Records(records=signed).SerializeToString()
        rows.append({"records": [raw.hex() for raw in signed], "frame": (struct.pack(">I", len(body)) + body).hex()})
    return rows


def announce_frames() -> list[Row]:
    """What /psyche/announce/1 carries, and the answer."""
    rows = []
    for signed in ([], [row["signed"] for row in announcement_rows()]):
        body = wire.AnnounceRequest(announcements=[bytes.fromhex(raw) for raw in signed]).SerializeToString()
        frame = struct.pack(">I", len(body)) + body
        rows.append({"announcements": signed, "frame": frame.hex(), "answer": direct._TAKEN.hex()})
    return rows


def kademlia_rows() -> list[Row]:
    """Key and value of a node's record in Kademlia."""
    name = f"/psyche-{RUN.hex()[:32]}/{KEY.public.hex()}"
    row = record_rows()[0]
    return [{"run": RUN.hex(), "node_key": KEY.public.hex(), "key": name, "value": row["signed"]}]


def peers_file() -> list[Row]:
    """The file of known peers, whole."""
    signed = [row["signed"] for row in record_rows()[:2]]
    body = wire.Records(records=[bytes.fromhex(raw) for raw in signed]).SerializeToString()
    raw = peerstore._MAGIC + blake3(body).digest() + body
    return [{"records": signed, "file": raw.hex()}]


def blob_rows() -> list[Row]:
    rows = []
    for length in (0, 1, 1000, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 12_345):
        data = content(length)
        pieces = [blobs.piece_digest(data[at : at + PIECE]) for at in range(0, length, PIECE)]
        manifest = wire.Manifest(length=length, pieces=b"".join(pieces)).SerializeToString()
        rows.append(
            {
                "length": length,
                "pieces": [piece.hex() for piece in pieces],
                "digest": blobs.blob_digest(data).hex(),
                "manifest": manifest.hex(),
            }
        )
    return rows


def tree_rows() -> list[Row]:
    rows = []
    for count, hidden in ((1, 0), (2, 0), (8, 0), (8, 3)):
        members = [NodeKey(bytes([number]) * 32).public for number in range(count)]
        private = members[:hidden]
        tree = fanout.Tree(300, members[-1], members, private)
        rows.append(
            {
                "round": 300,
                "members": [member.hex() for member in members],
                "private": [member.hex() for member in private],
                "author": members[-1].hex(),
                "order": [member.hex() for member in tree.order],
                "children": [[child.hex() for child in tree.children(member)] for member in tree.order],
            }
        )
    return rows


def call_rows() -> list[Row]:
    signed = statements.Announcement(RUN, 300, KEY.public, DIGEST, 60_000).sign(KEY)
    calls = {
        "Announce": (wire.AnnounceRequest(announcements=[signed]), wire.AnnounceReply()),
        "Since": (
            wire.SinceRequest(round=300, have=b"\x05\x80", wanted=[DIGEST, bytes(32)]),
            wire.SinceReply(
                announcements=[signed], held=[DIGEST], partial=[wire.Holding(digest=bytes(32), pieces=b"\x0f\x02")]
            ),
        ),
        "GetManifest": (
            wire.ManifestRequest(digest=DIGEST, first=service.MAX_PIECES_PER_MANIFEST),
            wire.Manifest(length=PIECE + 1, pieces=DIGEST + bytes(32)),
        ),
        "Fetch": (wire.FetchRequest(digest=DIGEST, first=2, count=16, kind=wire.MODEL), None),
        "Have": (wire.HaveRequest(digests=[DIGEST]), wire.HaveReply()),
        "DialBack": (wire.DialBackRequest(port=4002), wire.DialBackReply(observed="203.0.113.9:50000", reached=True)),
    }
    rows = []
    for method, (request, reply) in calls.items():
        raw = request.SerializeToString(deterministic=True)
        row = {"path": f"/{service.SERVICE}/{method}", "request": raw.hex(), "framed": _framed(raw).hex()}
        if reply is not None:
            row["reply"] = reply.SerializeToString(deterministic=True).hex()
        else:
            row["stream"] = "each message is the bytes of one piece"
            row["first_message_framed"] = _framed(content(3)).hex()
        rows.append(row)
    return rows


def push_rows() -> list[Row]:
    """All messages of a push: of one piece, and of two."""
    rows = []
    for length in (3, PIECE + 1):
        data = content(length)
        pieces = [blobs.piece_digest(data[at : at + PIECE]) for at in range(0, length, PIECE)]
        header = wire.PushHeader(round=300, digest=blobs.blob_digest(data), length=length)
        raw = header.SerializeToString(deterministic=True)
        rows.append(
            {
                "path": f"/{service.SERVICE}/Push",
                "length": length,
                "header": raw.hex(),
                "list": b"".join(pieces).hex() if len(pieces) > 1 else "",
                "then": "the bytes of the blob",
                "reply": wire.PushReply().SerializeToString().hex(),
            }
        )
    return rows


def punch_rows() -> list[Row]:
    messages = {
        "request": wire.Punch(peer=OTHER.public, address="203.0.113.9:50000"),
        "invitation": wire.Punch(peer=KEY.public, address="203.0.113.9:50000"),
        "answer": wire.Punch(address="198.51.100.7:40000", certificate=b"PEM"),
        "refusal": wire.Punch(refusal="not connected to it"),
    }
    rows = []
    for name, message in messages.items():
        body = message.SerializeToString(deterministic=True)
        rows.append({"punch": name, "frame": (struct.pack(">I", len(body)) + body).hex()})
    return rows


def _framed(message: bytes) -> bytes:
    """gRPC's length-prefixed message: not compressed, u32 big-endian length."""
    return struct.pack(">BI", 0, len(message)) + message


def tls_rows() -> list[Row]:
    leaf = ec.derive_private_key(TLS_SCALAR, ec.SECP256R1()).public_key()
    spki = leaf.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return [
        {
            "seed": KEY.seed.hex(),
            "p256_private_key": TLS_SCALAR.to_bytes(32, "big").hex(),
            "subject_public_key_info": spki.hex(),
            "oid": certificates.EXTENSION.dotted_string,
            "extension_value": certificates.extension_value(KEY, spki).hex(),
        }
    ]


def null_ca_rows() -> list[Row]:
    phrase = "psyche-node null CA: this private key is public on purpose"
    key, certificate = certificates._null_ca()
    return [
        {
            "private_key": f"the first 31 bytes of SHA-256({phrase!r}), big-endian",
            "p256_private_key": hashlib.sha256(phrase.encode()).digest()[:31].rjust(32, b"\0").hex(),
            "subject": certificate.subject.rfc4514_string(),
            "subject_public_key_info": key.public_key()
            .public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            .hex(),
        }
    ]


def names() -> Row:
    prefix = f"/psyche/1/{RUN.hex()[:32]}"
    return {
        "run": RUN.hex(),
        "topics": {"announcements": f"{prefix}/announcements", "records": f"{prefix}/records"},
        "libp2p": {
            "security": NOISE,
            "muxer": YAMUX,
            "gossip": [PROTOCOL_ID_V12, PROTOCOL_ID_V11, PROTOCOL_ID],
            "records": records.PROTOCOL,
            "ping": PING,
            "punch": rendezvous.PUNCH,
            "punched": rendezvous.PUNCHED,
        },
        "grpc_service": service.SERVICE,
        "signature_contexts": {
            "announcement": statements._ANNOUNCEMENT_CONTEXT.decode(),
            "node_record": statements._RECORD_CONTEXT.decode(),
            "tls": certificates._PREFIX.decode(),
        },
        "blob_root_context": blobs.ROOT_CONTEXT,
        "tree_context": fanout._CONTEXT,
    }


def bounds() -> Row:
    return {
        "announcement_bytes": statements.MAX_ANNOUNCEMENT,
        "record_bytes": statements.MAX_RECORD,
        "addresses_per_record": statements.MAX_ADDRESSES,
        "address_bytes": statements.MAX_ADDRESS,
        "records_frame_bytes": records.MAX_BYTES,
        "records_per_frame": records.MAX_RECORDS,
        "piece_bytes": PIECE,
        "blob_bytes": messages.MAX_BLOB_BYTES,
        "round": messages.MAX_ROUND,
        "rounds_ahead": announcements.ROUNDS_AHEAD,
        "bitmap_bytes": announcements.MAX_BITMAP,
        "members": messages.MAX_MEMBERS,
        "announcements_per_call": service.MAX_ANNOUNCEMENTS_PER_CALL,
        "pieces_per_fetch": sending.MAX_PIECES_PER_FETCH,
        "pieces_per_manifest": service.MAX_PIECES_PER_MANIFEST,
        "digests_per_have": service.MAX_DIGESTS_PER_HAVE,
        "partial_per_since": service.MAX_PARTIAL,
        "partial_bytes_per_since": service.MAX_PARTIAL_BYTES,
        "children_per_node": fanout.ARITY,
        "request_bytes": service.MAX_REQUEST_BYTES,
        "bulk_request_bytes": frames.MAX_REQUEST,
        "bulk_reason_bytes": frames.MAX_REASON,
        "reply_bytes": service.MAX_MESSAGE_BYTES,
        "streams": guard.MAX_STREAMS,
        "streams_per_peer": guard.MAX_STREAMS_PER_PEER,
        "push_header_bytes": push.MAX_HEADER_BYTES,
        "pushes": push.MAX_PUSHES,
        "punch_bytes": rendezvous.MAX_BYTES,
        "deadline_seconds": guard.MAX_DEADLINE_SECONDS,
        "calls_per_second": guard.CALLS_PER_SECOND,
    }


def statuses() -> list[Row]:
    meanings = {
        grpc.StatusCode.INVALID_ARGUMENT: "it does not parse, a field is out of range, or the call has no deadline",
        grpc.StatusCode.NOT_FOUND: "this node does not hold the blob",
        grpc.StatusCode.PERMISSION_DENIED: "the caller is no member by the node key of its certificate over TLS 1.3",
        grpc.StatusCode.RESOURCE_EXHAUSTED: "too many calls a second, too many open streams, or too large a message",
        grpc.StatusCode.ALREADY_EXISTS: "this node holds the blob that is pushed; that is no failure",
        grpc.StatusCode.FAILED_PRECONDITION: "the blob that is pushed is not looked for here",
        grpc.StatusCode.UNIMPLEMENTED: "this version does not know the method",
    }
    return [{"code": code.value[0], "name": code.name, "when": when} for code, when in meanings.items()]


def refused() -> list[Row]:
    """Statements that are well signed or well formed, and must be refused all the same."""
    good = statements.Announcement(RUN, 300, KEY.public, DIGEST, 60_000)
    body = good.body()

    def signed(raw: bytes, key: NodeKey = KEY, context: bytes = statements._ANNOUNCEMENT_CONTEXT) -> bytes:
        return wire.Signed(body=raw, signature=key.sign(context + raw)).SerializeToString(deterministic=True)

    cases: dict[str, bytes] = {
        "signed by another key": signed(body, OTHER),
        "signed in the context of a node record": signed(body, context=statements._RECORD_CONTEXT),
        "an unknown field in the body": signed(body + b"\x98\x06\x00"),
        "an unknown field beside the body": signed(body) + b"\x98\x06\x00",
        "round 300 as a varint of three bytes": signed(body.replace(b"\x10\xac\x02", b"\x10\xac\x82\x00")),
        "another run": statements.Announcement(bytes(32), 300, KEY.public, DIGEST, 60_000).sign(KEY),
        "length 0": statements.Announcement(RUN, 300, KEY.public, DIGEST, 0).sign(KEY),
        "a digest of 31 bytes": statements.Announcement(RUN, 300, KEY.public, DIGEST[1:], 60_000).sign(KEY),
    }
    return [{"announcement": name, "signed": raw.hex()} for name, raw in cases.items()]


def bulk_rows() -> Row:
    """What travels inside TLS on a bulk connection."""
    request = wire.FetchRequest(digest=bytes(range(32)), first=3, count=2, kind=wire.CHECKPOINT).SerializeToString()
    piece = bytes(range(7))
    return {
        "alpn": frames.ALPN,
        "request": {"message": request.hex(), "frame": frames.request_frame(request).hex()},
        "piece": {"bytes": piece.hex(), "frame": (frames.piece_header(piece) + piece).hex()},
        "ends": [
            {"status": int(status), "reason": reason, "frame": frames.end_frame(status, reason).hex()}
            for status, reason in ((sending.Status.OK, ""), (sending.Status.NOT_FOUND, "not here \u2013 any more"))
        ],
    }


SECTIONS: dict[str, Callable[[], list[Row] | Row]] = {
    "names": names,
    "bounds": bounds,
    "keys": keys,
    "announcements": announcement_rows,
    "node_records": record_rows,
    "refused": refused,
    "gossip_message_ids": message_ids,
    "records_frames": frame_rows,
    "announce_frames": announce_frames,
    "kademlia": kademlia_rows,
    "peers_files": peers_file,
    "blobs": blob_rows,
    "tls_extension": tls_rows,
    "null_ca": null_ca_rows,
    "trees": tree_rows,
    "calls": call_rows,
    "pushes": push_rows,
    "punches": punch_rows,
    "bulk_frames": bulk_rows,
    "statuses": statuses,
}


def text() -> str:
    return json.dumps({name: section() for name, section in SECTIONS.items()}, indent=1) + "\n"


def main() -> None:
    if "--check" not in sys.argv[1:]:
        FILE.write_text(text())
        print(f"wrote {FILE}")
    elif FILE.read_text() != text():
        sys.exit(f"{FILE} is not current. Run: python tests/network/wire_vectors.py")


if __name__ == "__main__":
    main()
