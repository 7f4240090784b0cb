"""Requests of members over gRPC: wrong ones, costly ones, too many of them, and readers that stop."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_nodes import Node
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nodes_of_a_test import makers_of

from psyche_node.network.blobs import DIGEST_BYTES, PIECE_BYTES, Manifest
from psyche_node.network.guard import (
    MAX_STREAMS_PER_PEER,
    Pace,
)
from psyche_node.network.links import CallFailed, Cause, Links, Stream
from psyche_node.network.service import SERVICE
from psyche_node.network.wire import node_pb2 as wire

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[], Node]]:
    yield from makers_of(Node, tmp_path)


def test_requests_that_are_wrong_are_refused_before_anything_is_done(make: Callable[[], Node]) -> None:
    a, b = make(), make()
    a.knows(b)
    b.knows(a)
    digest, _ = b.store.put(b"blob", 0)
    for method, request in (
        ("Since", wire.SinceRequest(have=bytes(33))),
        ("Since", wire.SinceRequest(wanted=[b"short"])),
        ("Since", wire.SinceRequest(wanted=[bytes(32)] * 257)),
        ("Announce", wire.AnnounceRequest(announcements=[b"x"] * 65)),
        ("GetManifest", wire.ManifestRequest(digest=b"")),
        ("GetManifest", wire.ManifestRequest(digest=digest, first=1)),
        ("Have", wire.HaveRequest(digests=[b"short"])),
        ("Have", wire.HaveRequest(digests=[bytes(32)] * 33)),
    ):
        with pytest.raises(CallFailed) as failure:
            a.links.call(b.key.public, method, request, wire.SinceReply, 60.0)
        assert failure.value.cause is Cause.BROKEN, method
    for first, count in ((0, 0), (0, 2), (1, 1), (0, 65), (2**32 - 1, 1)):
        with pytest.raises(CallFailed):
            list(a.links.fetch(b.key.public, digest, first, count, 60.0))
    with pytest.raises(CallFailed) as failure:
        list(a.links.fetch(b.key.public, bytes(32), 0, 1, 60.0))
    assert failure.value.cause is Cause.MISSING
    assert b.taken == []
    assert b.offers == []
    assert list(a.links.fetch(b.key.public, digest, 0, 1, 60.0)) == [b"blob"]


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Node]]:
    a, b = (Node(tmp_path_factory.mktemp("fuzz")) for _ in range(2))
    a.knows(b)
    b.knows(a)
    yield a, b
    a.close()
    b.close()


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=60)
@given(
    method=st.sampled_from(["Announce", "Since", "GetManifest", "Fetch", "Have", "Nonsense"]),
    raw=st.binary(max_size=200),
)
def test_hostile_requests_end_with_a_status_and_the_server_lives(
    fuzzed: tuple[Node, Node], method: str, raw: bytes
) -> None:
    a, b = fuzzed
    channel = a.links._link(b.key.public).channel
    try:
        list(channel.unary_stream(f"/{SERVICE}/{method}")(raw, timeout=60))
        code = grpc.StatusCode.OK
    except grpc.RpcError as error:
        code = error.code()
    allowed = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.OK}
    assert code in (allowed if method != "Nonsense" else {grpc.StatusCode.UNIMPLEMENTED})
    a.ask(b)


def test_a_call_that_costs_more_counts_for_more(make: Callable[[], Node]) -> None:
    """Digests to look for, and a reply that is long; what nobody can help but ask counts once."""
    a, b = make(), make()
    a.knows(b)
    b.knows(a)
    pace = Pace(rate=0.0, burst=100.0, clock=lambda: 0.0)
    b.guard._pace = pace

    def left() -> float:
        return pace._buckets[a.key.public][0]

    a.ask(b)
    assert left() == 99
    request = wire.SinceRequest(wanted=[bytes([number]) * DIGEST_BYTES for number in range(256)])
    a.links.call(b.key.public, "Since", request, wire.SinceReply, 60.0)
    assert left() == 98 - request.ByteSize() // 1024 == 98 - 8
    pieces = tuple(os.urandom(DIGEST_BYTES) for _ in range(8192))
    manifest = Manifest(8192 * PIECE_BYTES, pieces)
    held = b.service._holdings.begin(b.store.begin(manifest, 0))
    a.links.call(b.key.public, "GetManifest", wire.ManifestRequest(digest=manifest.digest), wire.Manifest, 60.0)
    assert left() == 89 - 4
    b.service._holdings.end(held)


def test_a_peer_that_calls_too_often_is_told_so(make: Callable[[], Node]) -> None:
    a, b = make(), make()
    a.knows(b)
    b.knows(a)
    b.guard._pace = Pace(rate=0.0, burst=3.0)
    for _ in range(3):
        a.ask(b)
    with pytest.raises(CallFailed) as failure:
        a.ask(b)
    assert failure.value.cause is Cause.BUSY


@pytest.fixture
def hold_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Node], threading.Event]]:
    """Make a node send one piece of a stream, and no other before the event is set.

    A reader that stops does not hold a stream up for sure: gRPC may take a dozen pieces before somebody reads them.
    """
    go_on = threading.Event()

    def hold(node: Node) -> threading.Event:
        pieces = node.service.pieces._holdings.pieces

        def held(digest: bytes, wanted: range) -> Iterator[bytes]:
            for number, piece in zip(wanted, pieces(digest, wanted), strict=True):
                assert number == 0 or go_on.wait(60)
                yield piece

        monkeypatch.setattr(node.service.pieces._holdings, "pieces", held)
        return go_on

    yield hold
    go_on.set()


def test_a_stream_costs_its_place_until_it_has_ended(
    make: Callable[[], Node], hold_up: Callable[[Node], threading.Event]
) -> None:
    a, b = make(), make()
    a.knows(b)
    b.knows(a)
    go_on = hold_up(b)
    b.service.pieces._uploads._streams._clock = lambda: 0.0  # no stream is late, however long this takes
    # Two blobs, since nobody gets one very often.
    other, digest = (b.store.put(os.urandom(12 << 20), 0)[0] for _ in range(2))
    stalled = [
        iter(a.links.fetch(b.key.public, (other, digest)[number % 2], 0, 12, 60.0))
        for number in range(MAX_STREAMS_PER_PEER)
    ]
    for stream in stalled:
        next(stream)
    with pytest.raises(CallFailed) as failure:
        list(a.links.fetch(b.key.public, digest, 0, 1, 60.0))
    assert failure.value.cause is Cause.BUSY
    # Short calls are not behind the streams.
    a.ask(b)
    go_on.set()
    for stream in stalled:
        assert sum(1 for _ in stream) == 11
    deadline = time.monotonic() + 60
    while (cause := failure_of(a, b, digest)) is not None:
        assert cause is Cause.BUSY
        assert time.monotonic() < deadline, "the streams were not given back"


@pytest.mark.parametrize(
    ("end", "cause"),
    [(lambda links, stream: links.close(), Cause.BUSY), (lambda links, stream: stream.cancel(), Cause.SLOW)],
)
def test_a_stream_whose_channel_is_closed_is_not_its_peers_fault(
    make: Callable[[], Node],
    hold_up: Callable[[Node], threading.Event],
    end: Callable[[Links, Stream], None],
    cause: Cause,
) -> None:
    a, b = make(), make()
    a.knows(b)
    b.knows(a)
    hold_up(b)
    digest, _ = b.store.put(os.urandom(2 << 20), 0)
    stream = a.links.fetch(b.key.public, digest, 0, 2, 60.0)
    pieces = iter(stream)
    next(pieces)
    end(a.links, stream)
    with pytest.raises(CallFailed) as failure:
        list(pieces)
    assert failure.value.cause is cause


def failure_of(client: Node, server: Node, digest: bytes) -> Cause | None:
    try:
        list(client.links.fetch(server.key.public, digest, 0, 1, 60.0))
    except CallFailed as error:
        return error.cause
    return None
