"""Hostile bytes for everything that reads the wire: in the tests some hundred, by `make nightly` a million.

python tests/network/fuzzing.py 1000000                every target in turn, random inputs
python tests/network/fuzzing.py 1000000 --coverage     the same, guided by coverage (needs atheris: Python 3.11)

An input is bytes; a target builds a valid message from them, changes it in a few places, signs it with a known key (so
that what lies behind the signature is reached, too), and hands it over. Only the errors that a reader declares may come
out. An input that takes longer than SECONDS, or for which more than MEMORY bytes are allocated, is a failure.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import importlib.util
import inspect
import itertools
import json
import logging
import os
import random
import signal
import struct
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
from blake3 import blake3
from libp2p.io.exceptions import IncompleteReadError

from psyche_node.faults import Faults
from psyche_node.identity import NodeKey
from psyche_node.ipc import IpcError, Message, decode_frame
from psyche_node.network import direct, peerstore
from psyche_node.network.announcements import Verdict
from psyche_node.network.certificates import BadCertificate, identify, issue
from psyche_node.network.direct import DirectAnnouncements
from psyche_node.network.download import BadBytes, Download, NothingYet, Tools
from psyche_node.network.fanout import Tree
from psyche_node.network.kademlia import Records as KademliaRecords
from psyche_node.network.links import CallFailed, Links
from psyche_node.network.messages import Configure, Fetched, Kind, Publish, Rejected, SetMembers, Want
from psyche_node.network.node import NetworkNode
from psyche_node.network.peerstore import Peerstore
from psyche_node.network.pieces import pack, unpack
from psyche_node.network.records import RecordExchange
from psyche_node.network.reports import Traffic
from psyche_node.network.service import MAX_MESSAGE_BYTES, MAX_REQUEST_BYTES, NodeService
from psyche_node.network.statements import (
    Announcement,
    Malformed,
    NodeRecord,
    join_address,
    join_multiaddr,
    split_address,
    split_multiaddr,
)
from psyche_node.network.store import BlobStore, blob_digest, piece_digest
from psyche_node.network.wants import Choice, Role
from psyche_node.network.wants import Want as OpenWant
from psyche_node.network.wire import node_pb2 as wire

SECONDS = 2
MEMORY = 24 << 20
KEYS = [NodeKey(bytes([number]) * 32) for number in range(4)]
RUN = bytes(range(32))
DIGEST = bytes(range(200, 232))
INTERESTING = [0, 1, 2, 7, 8, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 257, 512, 2**16, 2**20, 2**31 - 1, 2**31]
INTERESTING += [2**32 - 1, 2**32, 2**37, 2**37 + 1, 2**63 - 1, 2**63, 2**64 - 1]


NAMES = ["statements", "taken", "records", "announced", "stored", "bitmaps", "addresses", "requests", "replies"]
NAMES += ["certificates", "frames"]


class Input:
    """Reads decisions from an input's bytes; when they are used up everything is 0."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def below(self, bound: int) -> int:
        return (self.byte() if bound <= 256 else self.byte() << 8 | self.byte()) % bound

    def one(self, choices: list[Any]) -> Any:
        return choices[self.below(len(choices))]

    def raw(self, bound: int) -> bytes:
        size = self.below(bound + 1)
        taken = self._data[self._at : self._at + size]
        self._at += size
        return taken

    def number(self) -> int:
        return self.one(INTERESTING) if self.byte() & 1 else int.from_bytes(self.raw(8), "little")

    def rest(self) -> bytes:
        return self._data[self._at :]


def changed(data: Input, raw: bytes) -> bytes:
    """Change raw bytes in one way: cut, grow, flip, overwrite, repeat; often not at all."""
    kind, at = data.below(8), data.below(len(raw) + 1)
    if kind == 0:
        return raw[:at]
    if kind == 1:
        return raw + data.raw(40)
    if kind == 2 and raw:
        at %= len(raw)
        return raw[:at] + bytes([raw[at] ^ (1 << data.below(8))]) + raw[at + 1 :]
    if kind == 3:
        part = data.raw(12)
        return raw[:at] + part + raw[at + len(part) :]
    if kind == 4:
        return raw[:at] + raw[at // 2 :]
    return raw


def unknown(data: Input) -> bytes:
    """A protobuf field that nobody knows, or one that is known a second time, or half of one."""
    number, kind = data.below(40), data.below(8)
    head = _varint(number << 3 | kind)
    return head + (_varint(data.number()) if kind == 0 else _varint(data.below(300)) + data.raw(40))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def mutated(data: Input, message: Any) -> bytes:
    """Set some fields of a protobuf message to other values, and serialize it with something added now and then."""
    fields = message.DESCRIPTOR.fields
    for _ in range(data.below(4)):
        field = data.one(list(fields))
        if field.is_repeated:
            values = getattr(message, field.name)
            if data.byte() & 1 and len(values):
                del values[data.below(len(values))]
            else:
                values.extend([_value(data, field)] * data.one([1, 1, 2, 9, 65, 300]))
        else:
            setattr(message, field.name, _value(data, field))
    raw = bytes(message.SerializeToString(deterministic=True))
    return raw + unknown(data) if data.below(4) == 0 else raw


def _value(data: Input, field: Any) -> Any:
    if field.type == field.TYPE_BYTES:
        known = [DIGEST, bytes(32), KEYS[0].public, RUN, b"", bytes(33), bytes(3000)]
        return data.one(known) if data.below(3) else data.raw(64)
    if field.type == field.TYPE_STRING:
        return address(data)
    if field.type == field.TYPE_BOOL:
        return bool(data.byte() & 1)
    return data.number() % (2**32 if field.type in (field.TYPE_UINT32, field.TYPE_ENUM) else 2**64)


def address(data: Input) -> str:
    """Something like an address, often one."""
    ip = data.one(["127.0.0.1", "192.0.2.1", "::1", "fe80::1%lo", "0.0.0.0", "224.0.0.1", "example.org", "", "1" * 200])
    port = str(data.number()) if data.byte() & 1 else data.one(["1", "65535", "0", "-1", "007", "٣", "", "1e3"])
    text = data.one([f"/ip4/{ip}/tcp/{port}", f"/ip6/{ip}/tcp/{port}", f"{ip}:{port}", f"[{ip}]:{port}", ip, "//" * 80])
    return changed(data, text.encode()).decode(errors="replace")


def signed(data: Input, body: bytes, context: bytes) -> bytes:
    """Sign a body, nearly always with the right key and context, and break the result now and then."""
    key = KEYS[0] if data.below(16) else KEYS[1]
    context = context if data.below(16) else b"psyche-node/nonsense/1:"
    raw = wire.Signed(body=body, signature=key.sign(context + body)).SerializeToString(deterministic=True)
    return changed(data, raw) if data.below(4) == 0 else raw


def announcement(data: Input) -> bytes:
    key = data.one(KEYS)
    fields = {"run": RUN, "round": data.below(12), "node_key": key.public, "digest": DIGEST, "length": 1000}
    return signed(data, mutated(data, wire.Announcement(**fields)), b"psyche-node/announcement/1:")


def record(data: Input) -> bytes:
    message = wire.NodeRecord(
        run=RUN,
        node_key=data.one(KEYS).public,
        seq=data.number(),
        p2p_addresses=["/ip4/127.0.0.1/tcp/4001"] * data.below(10),
        grpc_address="127.0.0.1:4002",
        tls_leaf=DIGEST,
        tls_expires=1,
    )
    return signed(data, mutated(data, message), b"psyche-node/record/1:")


class Aborted(Exception):
    """What a call's context raises when a method ends the call."""


class Context:
    """A call's context, as gRPC gives it to a method."""

    def __init__(self) -> None:
        self.ended: Callable[[], None] = lambda: None
        self.aborted: grpc.StatusCode | None = None

    def abort(self, code: grpc.StatusCode, reason: str) -> None:
        assert code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
        self.aborted = code
        raise Aborted(reason)

    def cancel(self) -> None:
        pass

    def add_callback(self, callback: Callable[[], None]) -> bool:
        self.ended = callback
        return True


class Stream:
    """A libp2p stream that gives what was sent before, in small and large parts, and then ends."""

    def __init__(self, data: bytes, part: int) -> None:
        self._data, self._at, self._part = data, 0, part

    async def read(self, n: int | None = None) -> bytes:
        size = min(self._part, len(self._data) if n is None or n < 0 else n)
        self._at += size
        return self._data[self._at - size : self._at]


class Peer:
    """The far end of a gRPC channel: it answers with the bytes it is told to."""

    def __init__(self) -> None:
        self.reply, self.pieces = b"", list[bytes]()

    def unary_unary(self, path: str) -> Callable[..., bytes]:
        return lambda raw, timeout: self.reply

    def unary_stream(self, path: str) -> Callable[..., Any]:
        return lambda raw, timeout: _Call(self.pieces)


class _Call:
    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = iter(pieces)

    def __iter__(self) -> Iterator[bytes]:
        return self._pieces

    def cancel(self) -> None:
        self._pieces = iter(())


def ignored(message: Message) -> None:
    """Where events go."""


class Targets:
    """Everything that is fuzzed. Each method takes an input, raises nothing, and says whether it was accepted."""

    def __init__(self, folder: Path) -> None:
        key_path = folder / "node.key"
        key_path.write_bytes(KEYS[3].seed)
        key_path.chmod(0o600)
        configure = Configure(folder=str(folder / "node"), node_key_path=str(key_path), run=RUN.hex())
        self.node = NetworkNode(configure, ignored)
        self.directory = self.node._directory
        self.directory.set_members({number: key.public for number, key in enumerate(KEYS[:2])})
        self.exchange: RecordExchange = self.node._swarm._records
        self.store: BlobStore = self.node._store
        self.blobs = [self.store.put(bytes([number]) * size, 1) for number, size in enumerate((1, 5000, (2 << 20) + 7))]
        self.service = NodeService(
            self.node._announcements,
            self.node._take_announcement,
            self.node._holdings,
            Traffic(),
            Faults(),
            self.node._fetcher.invited,
            self.node._quality.heard,
        )
        self.peer = Peer()
        self.links: Links = self.node._links
        self.links._link = lambda peer: SimpleNamespace(channel=self.peer)  # type: ignore[assignment,method-assign]
        node = self.node
        begun = lambda want: None  # noqa: E731
        self.tools = Tools(node._store, node._reader, node._holdings, node._links, node._quality, begun)
        self.direct: DirectAnnouncements = node._swarm.direct
        self.values = KademliaRecords(RUN, self.directory)
        self.peers = Peerstore(folder / "peers", RUN)
        self.leaf = issue(KEYS[0])
        self.der = base64.b64decode(b"".join(self.leaf.certificate.split(b"\n")[1:-2]))
        self.messages = [
            SetMembers(members=[]),
            Publish(round=1, member=1, digest="00" * 32, length=1),
            Want(round=1, wants=[]),
            Fetched(round=1, member=1, digest="00" * 32, length=1, source="x"),
            Rejected(what="call", peer="x", member=None, reason="x"),
            configure,
        ]
        self.all: dict[str, Callable[[Input], bool]] = {name: getattr(self, name) for name in NAMES}

    def statements(self, data: Input) -> bool:
        raw = data.rest() if data.below(8) == 0 else data.one([announcement, record])(data)
        accepted = False
        for kind in (Announcement, NodeRecord):
            with contextlib.suppress(Malformed):
                said = kind.parse(raw, RUN)
                # Ed25519 signs the same bytes the same way, so there is nothing in it that was not read.
                assert said.sign(next(key for key in KEYS if key.public == said.node_key)) == raw
                accepted = True
        return accepted

    def taken(self, data: Input) -> bool:
        """What a node does with statements from gossip and from calls, whoever passes them on."""
        sender = data.one([KEYS[0].public, KEYS[2].public, "a peer without a key"])
        if data.byte() & 1:
            return self.node._take_announcement(announcement(data), sender).verdict is not Verdict.REFUSED
        return self.node._take_record(record(data), sender)

    def records(self, data: Input) -> bool:
        count = data.one([0, 1, 2, 2, 3, 40])
        one = record(data)
        body = mutated(data, wire.Records(records=[one if data.below(4) else record(data) for _ in range(count)]))
        length = len(body) if data.below(4) else data.number() % 2**32
        part = data.one([1, 3, 4096]) if len(body) < 4096 else 65536
        stream = Stream(struct.pack(">I", length) + body, part)
        try:
            # Nothing in it waits for anything but the stream, so it ends in one step.
            self.exchange._receive(stream, data.one(KEYS).public).send(None)  # type: ignore[arg-type]
        except StopIteration:
            return True
        except (Malformed, IncompleteReadError):
            pass
        return False

    def announced(self, data: Input) -> bool:
        """What a peer sends over /psyche/announce/1, once its frame has been read."""
        request = wire.AnnounceRequest(announcements=[announcement(data)] * data.one([1, 1, 2, 65]))
        try:
            self.direct._take(changed(data, mutated(data, request))[: direct.MAX_BYTES], data.one(KEYS).public)
        except Malformed:
            return False
        return True

    def stored(self, data: Input) -> bool:
        """Values for Kademlia, and files of known peers."""
        if data.byte() & 1:
            owner = data.one(KEYS).public.hex()
            name = changed(data, f"/psyche-{RUN.hex()[:32]}/{owner}".encode()).decode(errors="replace")
            values = [record(data) for _ in range(1 + data.below(3))]
            assert 0 <= self.values.select(name, values) < len(values)
            try:
                self.values.validate(name, values[0])
            except ValueError:
                return False
            return True
        body = mutated(data, wire.Records(records=[record(data)]))
        raw = peerstore._MAGIC + blake3(body).digest() + body
        self.peers._path.write_bytes(changed(data, raw) if data.byte() & 1 else raw)
        return bool(self.peers.load())

    def bitmaps(self, data: Input) -> bool:
        bitmap, count = data.raw(64), data.one([0, 1, 7, 8, 9, 500])
        held = unpack(bitmap, count)
        assert len(held) == count
        assert set(held) <= {0, 1}
        return unpack(pack(held), count) == held

    def addresses(self, data: Input) -> bool:
        text = data.rest().decode(errors="replace") if data.below(8) == 0 else address(data)
        for split, join in ((split_multiaddr, join_multiaddr), (split_address, join_address)):
            with contextlib.suppress(Malformed):
                ip, port = split(text)
                assert split(join(ip, port)) == (ip, port)
                return True
        return False

    def requests(self, data: Input) -> bool:
        digest = data.one([digest for digest, _ in self.blobs])
        method, message = data.one(
            [
                (self.service.announce, wire.AnnounceRequest(announcements=[announcement(data)])),
                (self.service.since, wire.SinceRequest(round=data.below(12), have=data.raw(40), wanted=[digest])),
                (self.service.manifest, wire.ManifestRequest(digest=digest)),
                (self.service.fetch, wire.FetchRequest(digest=digest, first=data.below(4), count=data.below(4))),
                (self.service.have, wire.HaveRequest(digests=[digest])),
            ]
        )
        raw = changed(data, mutated(data, message))[:MAX_REQUEST_BYTES]
        context = Context()
        with contextlib.suppress(Aborted):
            sent = method(data.one(KEYS).public, raw, context)
            for part in sent if isinstance(sent, Iterator) else [sent]:
                assert len(part) <= MAX_MESSAGE_BYTES
        context.ended()
        return context.aborted is None

    def replies(self, data: Input) -> bool:
        """A member's answers to this node that looks for a blob."""
        size = data.one([1, 1000, (1 << 20) + 5])
        blob = bytes([data.below(3)]) * size
        pieces = [blob[at : at + (1 << 20)] for at in range(0, size, 1 << 20)]
        manifest = wire.Manifest(length=size, pieces=b"".join(map(piece_digest, pieces)))
        self.peer.reply = changed(data, mutated(data, manifest))[:MAX_MESSAGE_BYTES]
        for _ in range(data.below(3)):
            kind, at = data.below(4), data.below(len(pieces) + 1)
            if kind == 0:
                pieces.insert(at, data.raw(50))
            elif kind == 1 and pieces:
                del pieces[at % len(pieces)]
            elif pieces:
                pieces[at % len(pieces)] = changed(data, pieces[at % len(pieces)])
        self.peer.pieces = pieces
        digest, kind = blob_digest(blob), data.one(list(Kind))
        want = OpenWant(1, 0, digest, size, kind, 0.0, Tree(digest, KEYS[0].public, [KEYS[1].public]))
        held = data.one([None, b"\1" * len(pieces), b"\0" * len(pieces)])
        try:
            Download(self.tools, want, Choice(KEYS[0].public, Role.HOLDER, held)).run()
        except (CallFailed, BadBytes, NothingYet):
            pass
        finally:
            if want.partial is not None:
                self.tools.holdings.end(want.partial)
        path = self.store.path(digest)
        if accepted := path is not None:
            assert blob_digest(path.read_bytes()) == digest
            path.unlink()
        reply = wire.SinceReply(announcements=[announcement(data)], held=[DIGEST])
        self.peer.reply = changed(data, mutated(data, reply))
        with contextlib.suppress(CallFailed):
            self.links.call(KEYS[0].public, "Since", wire.SinceRequest(), wire.SinceReply, 1.0)
        return accepted

    def certificates(self, data: Input) -> bool:
        der = self.der
        for _ in range(1 + data.below(3)):
            der = changed(data, der)
        pem = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der) + b"-----END CERTIFICATE-----\n"
        with contextlib.suppress(BadCertificate):
            assert identify(changed(data, pem) if data.below(4) == 0 else pem).node_key == KEYS[0].public
            return True
        return False

    def frames(self, data: Input) -> bool:
        message = data.one(self.messages)
        body = message.model_dump(mode="json")
        for _ in range(data.below(3)):
            name = data.one([*body, "extra"])
            odd = [None, True, -1, 0, 2**64, 1.5, "", "x" * 70, "0" * 64, [], [1], [{}], {}, {"a": 1}, [[[]]], 1e999]
            body[name] = data.one(odd)
        kind = data.one([type(message).__name__, "Stats", "Nonsense", 7, None])
        number = data.one([1, 0, -1, 2**70, "1", None, 1.0])
        raw = changed(data, json.dumps({"id": number, "kind": kind, "body": body}).encode())
        with contextlib.suppress(IpcError):
            decode_frame(raw)
            return True
        return False


@contextlib.contextmanager
def targets() -> Iterator[Targets]:
    """The targets, with a store in memory where the system has such a place."""
    logging.disable(logging.CRITICAL)
    place = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=place if os.access(place, os.W_OK) else None) as folder:
        try:
            yield Targets(Path(folder))
        finally:
            logging.disable(logging.NOTSET)


def _hangs(number: int, frame: object) -> None:
    raise AssertionError(f"an input took longer than {SECONDS} s")


def attempt(all_targets: Targets, name: str, data: bytes, watched: bool) -> bool:
    """Hand one input to one target within the bounds of time and, if ``watched``, of memory. Says what was wrong."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    if watched:
        tracemalloc.start()
    try:
        accepted = all_targets.all[name](Input(data))
        if watched:
            peak = tracemalloc.get_traced_memory()[1]
            assert peak <= MEMORY, f"{peak} bytes were allocated"
        return accepted
    except BaseException:
        print(f"target {name}, input {data.hex()}", file=sys.stderr)
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if watched:
            tracemalloc.stop()


def run(inputs: int, seed: int = 20261127) -> dict[str, float]:
    """Try so many random inputs, all targets in turn; return the share that each accepted.

    Raises AssertionError, or whatever should not have come out.
    """
    generator = random.Random(seed)
    began = time.monotonic()
    spent, accepted, tried = dict[str, float](), dict[str, int](), dict[str, int]()
    signal.signal(signal.SIGALRM, _hangs)
    with targets() as all_targets:
        names = itertools.cycle(all_targets.all)
        for number in range(inputs):
            name, data = next(names), generator.randbytes(generator.choice((8, 40, 120, 400)))
            started = time.perf_counter()
            # One input in a hundred: watching the memory costs several times the input.
            taken = attempt(all_targets, name, data, watched=number // len(all_targets.all) % 100 == 0)
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - started
            accepted[name] = accepted.get(name, 0) + taken
            tried[name] = tried.get(name, 0) + 1
    seconds = time.monotonic() - began
    print(f"{inputs} inputs in {seconds:.1f} s, {inputs / seconds:.0f} a second: each accepted or refused")
    for name, count in tried.items():
        print(f"  {name:13} {count / spent[name]:7.0f} a second, {accepted[name] / count:6.1%} accepted")
    return {name: accepted[name] / count for name, count in tried.items()}


def _functions() -> Iterator[Any]:
    """The functions and methods of this project that read what comes from outside."""
    for name, module in list(sys.modules.items()):
        if name != "psyche_node.ipc" and (not name.startswith("psyche_node.network.") or ".wire" in name):
            continue
        own = [item for item in vars(module).values() if getattr(item, "__module__", None) == name]
        for item in own:
            for one in vars(item).values() if inspect.isclass(item) else [item]:
                plain = getattr(one, "__func__", one)
                if inspect.isfunction(plain):
                    yield plain


def guided(inputs: int, seed: int) -> None:
    """The same, guided by coverage of this project's network code. Ends the process."""
    import atheris  # type: ignore[import-not-found]

    for function in _functions():
        atheris.instrument_func(function)
    with targets() as all_targets, tempfile.TemporaryDirectory() as corpus:
        names = list(all_targets.all)
        generator = random.Random(seed)
        for number in range(40 * len(names)):
            (Path(corpus) / str(number)).write_bytes(bytes([number % len(names)]) + generator.randbytes(120))

        def one(data: bytes) -> None:
            if data:
                all_targets.all[names[data[0] % len(names)]](Input(data[1:]))

        options = [f"-atheris_runs={inputs}", f"-seed={seed}", "-max_len=400", f"-timeout={10 * SECONDS}"]
        atheris.Setup([sys.argv[0], corpus, *options, "-rss_limit_mb=2048", "-print_final_stats=1"], one)
        atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", type=int, nargs="?", default=10_000)
    parser.add_argument("--seed", type=int, default=20261127)
    parser.add_argument("--coverage", action="store_true", help="guided by coverage")
    arguments = parser.parse_args()
    if arguments.coverage and importlib.util.find_spec("atheris") is None:
        print("atheris is not installed (it has wheels for Python 3.11 on Linux): no run guided by coverage")
    elif arguments.coverage:
        guided(arguments.inputs, arguments.seed)
    else:
        run(arguments.inputs, arguments.seed)


if __name__ == "__main__":
    main()
